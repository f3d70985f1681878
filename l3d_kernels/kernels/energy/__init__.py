"""The room energy."""
