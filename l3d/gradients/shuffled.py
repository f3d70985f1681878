"""Gradients whose parts are dealt out anew over the samples: a control in which no sample's gradient is left."""

from dataclasses import replace

import torch

from l3d.gradients.factors import Dense, Gradients, Part


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
