"""Shuffle gradients over the samples: a control in which no sample keeps its own gradient."""

import torch

from l3d.gradients.factors import Dense, Gradients, Part


def shuffled(gradients: Gradients, generator: torch.Generator | None = None) -> Gradients:
    """Return gradients whose parts are permuted over the samples, each part by its own permutation.

    For a part in rows the output gradients dy are permuted and the layer inputs x stay; a dense part is permuted as a
    whole. The permutations are independent, so no relation between tensors remains. The multiset of the rows of x and
    of dy does not change.
    """

    def permuted(part: Part) -> Part:
        order = torch.randperm(gradients.n_samples, generator=generator, device="cpu").to(gradients.device)
        return Dense(part.grad[order]) if isinstance(part, Dense) else part._replace(dy=part.dy[order])

    return gradients.changed(permuted)
