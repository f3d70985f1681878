"""The documented address of `l3d.decomposition.choose_ranks`."""

from l3d.decomposition.choose_ranks import ranks_from_gradients

__all__ = ["ranks_from_gradients"]
