"""Questions with a command of their own: scaling, training steps, moving averages, digits, tensor parallelism."""
