"""Memories: what a model knows of more tokens than it attends to."""
