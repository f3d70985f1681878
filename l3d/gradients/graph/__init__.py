"""The room gradients/graph."""
