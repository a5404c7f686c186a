"""Rows of a run's datasets: checked before training, and the order in which they are read."""

from unisd.rows.check import OVERLONG, Measured, RowChecker
from unisd.rows.gate import RowGate
from unisd.rows.order import EpochSampler
from unisd.rows.report import RowReport

__all__ = ["OVERLONG", "EpochSampler", "Measured", "RowChecker", "RowGate", "RowReport"]
