"""Build a control for a decomposition: the same model with random weights, which has learned nothing.

A decomposition of the control may look like a real one, and its error may be low. Only what the trained model's
decomposition has and the control's has not was learned from the data. (The other control, shuffled gradients, is
`l3d.gradients.shuffled`.)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from l3d.analysis.intervention import shifted
from l3d.gradients.model import Params, select_parameters


@contextmanager
def redrawn(model: nn.Module, params: Params = None, seed: int = 0) -> Iterator[nn.Module]:
    """Replace the chosen weights by random ones inside the block: normal, with each tensor's mean and deviation.

    On exit the weights are restored bit by bit. params: a glob, several, or None for all; seed: of the random weights.
    """
    with shifted(model, _redraw(model, params, seed)):
        yield model


@torch.no_grad()
def redraw_(model: nn.Module, params: Params = None, seed: int = 0) -> None:
    """Replace the chosen weights in place by the random ones of `redrawn`; nothing restores them."""
    for name, move in _redraw(model, params, seed).items():
        model.get_parameter(name).add_(move)


def _redraw(model: nn.Module, params: Params, seed: int) -> dict[str, Tensor]:
    """Draw random weights, and return their differences from the present ones by name."""
    generator = torch.Generator().manual_seed(seed)
    moves = {}
    for name, parameter in select_parameters(model, params).items():
        values = parameter.detach()
        drawn = torch.randn(values.shape, generator=generator, dtype=torch.float32, device="cpu").to(values)
        spread = values.std(correction=0) if values.numel() > 1 else values.abs().sum()
        moves[name] = values.mean() + spread * drawn - values
    return moves
