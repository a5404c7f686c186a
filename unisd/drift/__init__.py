"""Drift: how far training has moved the model from its base (`unisd.drift.probe`), and when that is measured."""

from unisd.drift.probe import DriftProbe, default_probe

__all__ = ["DriftProbe", "default_probe"]
