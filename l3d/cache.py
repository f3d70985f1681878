"""The documented address of `l3d.training.gradient_cache`."""

from l3d.training.gradient_cache import Cache

__all__ = ["Cache"]
