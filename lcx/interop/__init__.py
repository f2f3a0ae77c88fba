"""Checkpoints of other codebases, in and out."""
