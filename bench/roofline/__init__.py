"""How far the hardware could go: by counts, by compiled code and by measured ceilings."""
