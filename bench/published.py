"""The method as published, for comparison: every gradient materialised, everything dense, plain autograd.

Per-sample gradients by `torch.func.jacrev` over the batch's losses (so every sample costs a backward pass of the
whole batch), coefficients and reconstructions by dense products with materialised directions. Written here from
the description of the method; tests/test_bench.py holds its loss against ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from l3d.directions import Directions


def gradients(
    model: nn.Module, inputs: Tensor, names: list[str], losses: Callable[[Tensor], Tensor], chunk: int | None = None
) -> Tensor:
    """Return the materialised gradients of losses(model(inputs)) [S]: [S, all parameters of `names`]."""
    fixed = {name: p.detach() for name, p in model.named_parameters()}

    def of(chosen: dict[str, Tensor]) -> Tensor:
        output = torch.func.functional_call(model, {**fixed, **chosen}, (inputs,))
        return losses(getattr(output, "logits", output))

    jacobian = torch.func.jacrev(of, chunk_size=chunk)({name: fixed[name] for name in names})
    return torch.cat([jacobian[name].flatten(1) for name in names], dim=1)


def materialise(directions: Directions) -> Tensor:
    """Multiply all directions out: [K, all parameters]."""
    rows = []
    for _, piece in directions.items():
        left, right = piece.factors()
        rows.append(torch.einsum("kro,kri->koi", left, right).flatten(1))
    return torch.cat(rows, dim=1)


def loss(gradient: Tensor, encoder: Directions, decoder: Directions, n: int) -> Tensor:
    """Return Σ‖g − ĝ‖² / Σ‖g‖² with the n largest coefficients kept, from gradients [S, all parameters]."""
    coefficients = gradient @ materialise(encoder).T
    threshold = coefficients.detach().abs().flatten().topk(n).values.min()
    kept = coefficients * (coefficients.detach().abs() >= threshold)
    return (gradient - kept @ materialise(decoder)).square().sum() / gradient.square().sum()
