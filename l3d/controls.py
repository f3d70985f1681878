"""The documented address of the controls: shuffled gradients and redrawn weights."""

from l3d.analysis.controls import redraw_, redrawn
from l3d.gradients.shuffled import shuffled

__all__ = ["redraw_", "redrawn", "shuffled"]
