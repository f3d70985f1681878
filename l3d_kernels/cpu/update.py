"""Take a step of Adam and rescale directions in place, all tensors in one call of torch for each operation."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from l3d_kernels.splitting import as_rows


def adam_step(
    parameters: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    scales: list[Tensor],
    counts: Tensor,
    moves: Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    grams: int = 0,
) -> list[Tensor]:
    """Run `l3d_kernels.reference.adam_step`; the gradients of slices that rest must be zero."""
    beta1, beta2 = betas
    counts = counts.clamp_min(1)  # a slice that never moved does not move now either
    correction = (1 - beta2**counts).sqrt_()
    torch._foreach_mul_(first, _by_slice(1 - (1 - beta1) * moves, first))
    torch._foreach_add_(first, grads, alpha=1 - beta1)
    torch._foreach_mul_(second, _by_slice(1 - (1 - beta2) * moves, second))
    torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
    denominators = list(torch._foreach_sqrt(second))
    torch._foreach_add_(denominators, _by_slice(eps * correction, denominators))
    steps = list(torch._foreach_div(first, denominators))
    torch._foreach_mul_(steps, scales)
    torch._foreach_mul_(steps, _by_slice(moves * correction / (1 - beta1**counts), steps))
    torch._foreach_add_(parameters, steps, alpha=-lr)
    rows = [as_rows(p).to(counts.dtype) for p in parameters[:grams]]
    return [each @ each.mT for each in rows]


def rescale(
    parameters: list[Tensor], squared_norms: Tensor, shares: Sequence[int], moves: Tensor | None = None
) -> None:
    """Run `l3d_kernels.reference.rescale`."""
    factors = shared_factors(squared_norms, shares)
    if moves is not None:
        factors = {n: torch.where(moves != 0, factor, 1) for n, factor in factors.items()}
    scales = [factors[n].view(-1, *[1] * (p.ndim - 1)) for n, p in zip(shares, parameters, strict=True)]
    torch._foreach_mul_(parameters, scales)


def shared_factors(squared_norms: Tensor, shares: Iterable[int]) -> dict[int, Tensor]:
    """Return by how many tensors share a norm what each is multiplied by, so that their product has norm one: [K]."""
    squared = squared_norms.clamp_min(torch.finfo(squared_norms.dtype).tiny)
    return {n: squared.pow(-0.5 / n) for n in set(shares)}


def _by_slice(values: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Shape a value per slice [K] as each tensor needs it: [K, 1, ..]."""
    by_order = {n: values.view(-1, *[1] * (n - 1)) for n in {tensor.ndim for tensor in tensors}}
    return [by_order[tensor.ndim] for tensor in tensors]
