"""Take Adam steps relative to the size of each factor's entries.

A step of Adam has the size of lr, whatever the gradient's. The entries of a unit direction's factors shrink with its
rank, its width and the number of tensors, so that one absolute lr is too small for a small model and diverges for a
wide one. Here lr is relative: a fraction of each factor's root mean square entry at the start.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import l3d_kernels as lk
from l3d.decomposition.directions import Directions
from l3d_kernels import cpu
from l3d_kernels.registry import implementation


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
        wide = torch.promote_types(self.parameters[0].dtype, torch.float32)  # 16 bits do not count beyond 256
        own = [scales(p.detach(), n_groups) if relative else p.new_ones([1] * p.ndim) for p in self.parameters]
        self.scales = [scale.to(wide) for scale in own]
        self.first = [torch.zeros_like(p) for p in self.parameters]  # running mean of gradients
        self.second = [torch.zeros_like(p) for p in self.parameters]  # and of their squares
        self.count = 0
        like = self.parameters[0]
        self.counts = like.new_zeros(len(like), dtype=wide) if lazy else None  # steps of each slice

    @torch.no_grad()
    def step(self, gradients: Iterable[Tensor], lr: float, rows: Tensor | None = None) -> None:
        """Take one step against the gradients, given in the parameters' order.

        Where lazy, `rows` [n] are the slices that have a gradient (some may be listed twice); the others' must be zero.
        """
        # in the moments' layout; otherwise everything below is slower
        grads = [gradient.contiguous() for gradient in gradients]
        if self.counts is None:
            self.count += 1
            self._step_all(grads, lr)
        else:
            lists = (self.parameters, grads, self.first, self.second, self.scales)
            cpu.adam_step(*lists, *self.moved(rows), lr, self.betas, self.eps)

    def moved(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Count a step of the slices `rows` [n], or of all; return counts [K], and which move as ones and zeros [K]."""
        self.count += 1
        like = self.scales[0].new_empty(len(self.parameters[0])) if self.counts is None else self.counts
        if self.counts is None:
            return torch.full_like(like, self.count), torch.ones_like(like)
        moves = torch.ones_like(like) if rows is None else torch.zeros_like(like).index_fill_(0, rows, 1)
        self.counts += moves
        return self.counts, moves

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


@torch.no_grad()
def update(
    optimizer: RelativeAdam,
    decoder: Directions,
    gradients: Iterable[Tensor],
    lr: float,
    rows: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Take a step as `RelativeAdam.step` does, and rescale the decoder's directions to unit norm.

    With kernels that is one pass over gradients, parameters and moments, which also leaves the Gram matrices that the
    norms follow from, and one over the decoder; directions that rest have unit norm already and keep their bits.
    """
    if implementation(cpu.adam_step, backend, optimizer.parameters[0]) is cpu.adam_step:
        optimizer.step(gradients, lr, rows)
        decoder.normalize_()
        return
    counts, moves = optimizer.moved(rows)
    held = {id(parameter) for parameter in decoder.parameters()}
    every = list(zip(optimizer.parameters, gradients, optimizer.first, optimizer.second, optimizer.scales, strict=True))
    every.sort(key=lambda each: id(each[0]) not in held)  # the decoder's first
    parameters, grads, first, second, scale = (list(each) for each in zip(*every, strict=True))
    settings = (counts, moves, lr, optimizer.betas, optimizer.eps, len(held))
    grams = lk.adam_step(parameters, grads, first, second, scale, *settings, backend=backend)
    decoder.normalize_by(grams, moves, backend)


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
