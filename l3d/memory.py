"""The documented address of `l3d.training.memory`."""

from l3d.training.memory import keep_freed_memory, memory_now, peak_memory

__all__ = ["keep_freed_memory", "memory_now", "peak_memory"]
