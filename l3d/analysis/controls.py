"""What a finding must be held against: gradients whose structure is destroyed, a model that has learned nothing.

A decomposition of either looks like one of the real thing, and its error may even be low. What the real one has and
these have not is what was learned from the data.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from l3d.analysis.intervention import shifted
from l3d.gradients.model import Params, select_parameters


@contextmanager
def redrawn(model: nn.Module, params: Params = None, seed: int = 0) -> Iterator[nn.Module]:
    """Replace the chosen weights within the block by random ones, normal with each tensor's own mean and deviation.

    The very same bits return on exit. params: glob, globs or None for all; seed: of the draw.
    """
    with shifted(model, _redraw(model, params, seed)):
        yield model


@torch.no_grad()
def redraw_(model: nn.Module, params: Params = None, seed: int = 0) -> None:
    """Replace the chosen weights for good by those that `redrawn` puts in their place."""
    for name, move in _redraw(model, params, seed).items():
        model.get_parameter(name).add_(move)


def _redraw(model: nn.Module, params: Params, seed: int) -> dict[str, Tensor]:
    """Draw new weights, and return what leads to them from the present ones."""
    generator = torch.Generator().manual_seed(seed)
    moves = {}
    for name, parameter in select_parameters(model, params).items():
        values = parameter.detach()
        drawn = torch.randn(values.shape, generator=generator).to(values)
        spread = values.std(correction=0) if values.numel() > 1 else values.abs().sum()
        moves[name] = values.mean() + spread * drawn - values
    return moves
