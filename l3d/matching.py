"""The documented address of `l3d.analysis.consistency`."""

from l3d.analysis.consistency import Consistency, consistency, match

__all__ = ["Consistency", "consistency", "match"]
