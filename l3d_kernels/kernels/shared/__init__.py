"""The room shared."""
