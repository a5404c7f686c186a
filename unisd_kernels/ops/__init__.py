"""Public operations, one file each: checks, choice of implementation, autograd."""
