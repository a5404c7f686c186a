"""Data for training and evaluation: rows with the columns that the trainer reads.

Submodules are imported by name (`from unisd.data.procedural import procedural_dataset`), so that what needs only the
standard library loads without anything else.
"""
