"""Take Adam steps relative to the size of each factor's entries.

A step of Adam has the size of lr, whatever the gradient's. The entries of a unit direction's factors shrink with its
rank, its width and the number of tensors, so that one absolute lr is too small for a small model and diverges for a
wide one. Here lr is relative: a fraction of each factor's root mean square entry at the start.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class RelativeAdam:
    """Adam (Kingma & Ba, 2015) with one step size per tensor: lr times the tensor's scale at the start.

    Args:
        parameters: tensors to train; their root mean square entry becomes their scale.
        relative: False makes every scale one, and this plain Adam.
        n_groups: of equal size, into which the first axis of every tensor falls (decompositions side by side); each has
            a scale of its own.
        lazy: slices of the first axis, which all tensors share, rest while they have no gradient: their moments
            neither move them nor decay. Otherwise one gradient after a long pause moves a slice by thirty steps' worth
            over the next steps, which is enough to kill a subnetwork that is seldom kept.
        betas, eps: as in Adam.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        relative: bool = True,
        n_groups: int = 1,
        lazy: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.betas, self.eps = betas, eps
        self.scales = [scales(p.detach(), n_groups) if relative else p.new_ones([1] * p.ndim) for p in self.parameters]
        self.first = [torch.zeros_like(p) for p in self.parameters]  # running mean of gradients
        self.second = [torch.zeros_like(p) for p in self.parameters]  # and of their squares
        self.count = 0
        self.counts = self.parameters[0].new_zeros(len(self.parameters[0])) if lazy else None  # steps of each slice

    @torch.no_grad()
    def step(self, gradients: Iterable[Tensor], lr: float, rows: Tensor | None = None) -> None:
        """Take one step against the gradients, given in the parameters' order.

        Where lazy, `rows` [n] are the slices that have a gradient (some may be listed twice); the others' must be zero.
        """
        # in the moments' layout; otherwise everything below is slower
        grads = [gradient.contiguous() for gradient in gradients]
        self.count += 1
        if self.counts is None:
            self._step_all(grads, lr)
        else:
            self._step_rows(grads, lr, rows)

    def _step_all(self, grads: list[Tensor], lr: float) -> None:
        beta1, beta2 = self.betas
        torch._foreach_lerp_(self.first, grads, 1 - beta1)
        torch._foreach_mul_(self.second, beta2)
        torch._foreach_addcmul_(self.second, grads, grads, 1 - beta2)
        correction = (1 - beta2**self.count) ** 0.5
        denominators = torch._foreach_sqrt(self.second)
        torch._foreach_add_(denominators, self.eps * correction)
        steps = torch._foreach_div(self.first, denominators)
        torch._foreach_mul_(steps, self.scales)
        torch._foreach_add_(self.parameters, steps, alpha=-lr * correction / (1 - beta1**self.count))

    def _step_rows(self, grads: list[Tensor], lr: float, rows: Tensor | None) -> None:
        assert self.counts is not None
        moves = torch.ones_like(self.counts) if rows is None else torch.zeros_like(self.counts).index_fill_(0, rows, 1)
        self.counts += moves
        beta1, beta2 = self.betas
        counts = self.counts.clamp_min(1)  # a slice that never moved does not move now either
        correction = (1 - beta2**counts).sqrt_()
        torch._foreach_mul_(self.first, self._by_slice(1 - (1 - beta1) * moves))
        torch._foreach_add_(self.first, grads, alpha=1 - beta1)
        torch._foreach_mul_(self.second, self._by_slice(1 - (1 - beta2) * moves))
        torch._foreach_addcmul_(self.second, grads, grads, 1 - beta2)
        denominators = torch._foreach_sqrt(self.second)
        torch._foreach_add_(denominators, self._by_slice(self.eps * correction))
        steps = torch._foreach_div(self.first, denominators)
        torch._foreach_mul_(steps, self.scales)
        torch._foreach_mul_(steps, self._by_slice(moves * correction / (1 - beta1**counts)))
        torch._foreach_add_(self.parameters, steps, alpha=-lr)

    def _by_slice(self, values: Tensor) -> list[Tensor]:
        """Shape a value per slice [K] as each parameter needs it: [K, 1, ..]."""
        by_order = {n: values.view(-1, *[1] * (n - 1)) for n in {parameter.ndim for parameter in self.parameters}}
        return [by_order[parameter.ndim] for parameter in self.parameters]

    @torch.no_grad()
    def forget(self, rows: Tensor) -> None:
        """Reset the moments of some slices [n] of every tensor's first axis, which have been set anew."""
        for moment in (*self.first, *self.second):
            moment[rows] = 0
        if self.counts is not None:
            self.counts[rows] = 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state that a checkpoint needs: tensors, the optimiser's own, and json-able values."""
        kinds = {"first": self.first, "second": self.second, "scale": self.scales}
        tensors = {f"{kind}.{i}": tensor for kind, each in kinds.items() for i, tensor in enumerate(each)}
        if self.counts is not None:
            tensors["counts"] = self.counts
        return tensors, {"count": self.count}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises ValueError for the tensors of other parameters."""
        every = self.state()[0]
        if {name: own.shape for name, own in every.items()} != {name: held.shape for name, held in tensors.items()}:
            raise ValueError("optimizer: the checkpoint holds other tensors than this run's parameters need")
        for name, own in every.items():
            own.copy_(tensors[name])
        self.count = values["count"]


def scales(tensor: Tensor, n_groups: int) -> Tensor:
    """Return the root mean square entry of each group of slices [first axis / groups, ...], to multiply the tensor by.

    >>> scales(torch.tensor([[3.0, 3.0], [1.0, -1.0]]), n_groups=2)
    tensor([[3.],
            [1.]])
    """
    by_group = tensor.reshape(n_groups, -1).square().mean(1).sqrt()
    if n_groups > 1:
        by_group = by_group.repeat_interleave(len(tensor) // n_groups)
    return by_group.view([-1, *[1] * (tensor.ndim - 1)] if tensor.ndim else [])
