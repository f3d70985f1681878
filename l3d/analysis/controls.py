"""What a finding must be held against: gradients whose structure is destroyed, a model that has learned nothing.

A decomposition of either looks like one of the real thing, and its error may even be low. What the real one has and
these have not is what was learned from the data.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from l3d.analysis.intervention import shifted
from l3d.gradients.factors import Dense, Gradients, Part
from l3d.gradients.model import Params, select_parameters


def shuffled(gradients: Gradients, generator: torch.Generator | None = None) -> Gradients:
    """Return gradients in which what belongs to one sample is torn apart.

    For every tensor, what came back (dy) is dealt out anew over the samples while what the layer saw (x) stays; dense
    gradients are dealt out whole. Tensors are shuffled each by itself, so nothing joins them any more; the rows of x
    and dy are the same as before.
    """

    def deal(part: Part) -> Part:
        order = torch.randperm(gradients.n_samples, generator=generator).to(gradients.device)
        if isinstance(part, Dense):
            return Dense(part.grad[order])
        return replace(part, dy=part.dy[order])

    parts = {name: [deal(part) for part in parts] for name, parts in gradients.parts.items()}
    return Gradients(parts, gradients.shapes, gradients.n_samples, gradients.dtype, gradients.device)


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
