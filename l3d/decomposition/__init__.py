"""The room decomposition."""
