"""The room decode."""
