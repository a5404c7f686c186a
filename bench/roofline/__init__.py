"""Limits of the hardware: by counts, by compiled code and by measured ceilings."""
