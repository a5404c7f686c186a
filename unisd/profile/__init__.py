"""Where a step's time and memory go: `unisd train --profile`."""

from unisd.profile.phases import NoProfile, StepProfile
from unisd.profile.run import ProfiledRun

__all__ = ["NoProfile", "ProfiledRun", "StepProfile"]
