"""Adam whose steps know how large a factor's entries are.

Adam's steps have the size of lr whatever the gradient's. But the entries of a unit direction's factors shrink with its
rank, its width and the number of tensors, so one absolute lr is timid for a small model and divergent for a wide
one. Here lr is relative: a fraction of each factor's root mean square entry at the start.
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
        weight_decay: fraction of a tensor that a step of lr 1 takes off, apart from the gradients (AdamW, Loshchilov &
            Hutter, 2019); 0 is Adam.
        betas, eps: as in Adam.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        relative: bool = True,
        n_groups: int = 1,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.scales = [scales(p.detach(), n_groups) if relative else p.new_ones([1] * p.ndim) for p in self.parameters]
        self.first = [torch.zeros_like(p) for p in self.parameters]  # running mean of gradients
        self.second = [torch.zeros_like(p) for p in self.parameters]  # and of their squares
        self.count = 0

    @torch.no_grad()
    def step(self, gradients: Iterable[Tensor], lr: float) -> None:
        """Take one step against the gradients, given in the parameters' order."""
        grads = list(gradients)
        self.count += 1
        beta1, beta2 = self.betas
        torch._foreach_lerp_(self.first, grads, 1 - beta1)
        torch._foreach_mul_(self.second, beta2)
        torch._foreach_addcmul_(self.second, grads, grads, 1 - beta2)
        correction = (1 - beta2**self.count) ** 0.5
        denominators = torch._foreach_sqrt(self.second)
        torch._foreach_add_(denominators, self.eps * correction)
        if self.weight_decay:
            torch._foreach_mul_(self.parameters, 1 - lr * self.weight_decay)
        steps = torch._foreach_div(self.first, denominators)
        torch._foreach_mul_(steps, self.scales)
        torch._foreach_add_(self.parameters, steps, alpha=-lr * correction / (1 - beta1**self.count))

    @torch.no_grad()
    def forget(self, rows: Tensor) -> None:
        """Drop what was remembered of some slices [n] of every tensor's first axis, which have been set anew."""
        for moments in (self.first, self.second):
            for moment in moments:
                moment[rows] = 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what a checkpoint must hold: tensors, and json-able values."""
        tensors = {f"first.{i}": t for i, t in enumerate(self.first)}
        tensors |= {f"second.{i}": t for i, t in enumerate(self.second)}
        tensors |= {f"scale.{i}": t for i, t in enumerate(self.scales)}
        return tensors, {"count": self.count}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        for i in range(len(self.parameters)):
            self.first[i].copy_(tensors[f"first.{i}"])
            self.second[i].copy_(tensors[f"second.{i}"])
            self.scales[i].copy_(tensors[f"scale.{i}"])
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
