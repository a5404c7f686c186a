"""Many runs by one command: presets x seeds x data, which can be killed at any moment and go on."""

from unisd.sweep.cells import Cell, cells
from unisd.sweep.run import Outcome, Sweep

__all__ = ["Cell", "Outcome", "Sweep", "cells"]
