"""Folder of a run: settings, checkpoints, model card."""
