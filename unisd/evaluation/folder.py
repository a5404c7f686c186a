"""Where a run's evaluations are."""

EVALUATIONS = "eval"
"""Folder of a run's evaluations: `unisd eval ... -o RUN/eval`."""
