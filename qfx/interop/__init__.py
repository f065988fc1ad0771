"""Checkpoints of other programs, written and read."""
