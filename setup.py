"""Nothing to compile yet; all metadata is in pyproject.toml."""

from setuptools import setup

setup()
