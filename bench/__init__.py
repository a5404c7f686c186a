"""Benchmarks of the kernels and of the trainer; not in the wheel. `python -m bench --help` lists the commands."""
