"""The room distributed."""
