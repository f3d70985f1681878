"""Differentiate a model's output along a subnetwork's direction, and list the logits that change most.

    d f(x, W0 + δ Vout_i) / dδ  at δ = 0  =  J(x) Vout_i

This is one Jacobian-vector product in forward mode: a single forward pass gives the output and its derivative.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from l3d.analysis.intervention import output_with, parameters_of
from l3d.data.arguments import check_index
from l3d.data.batch import to_device
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.fixed import check_fixed
from l3d.storage.identity import check_identity

METHODS = ("forward", "double_backward")


class TopLogits(NamedTuple):
    """The entries of softmax(output) that a step along a subnetwork raises and lowers most.

    A language model has its own entries at every position. Values are derivatives per unit of δ.
    """

    raised: Tensor  # [..., n] int64 entries (classes, tokens), most raised first
    raised_by: Tensor  # [..., n] their derivatives, descending
    lowered: Tensor  # [..., n] int64 entries, most lowered first
    lowered_by: Tensor  # [..., n] their derivatives, ascending

    def __repr__(self) -> str:
        """Return the sizes, and the largest and smallest derivative."""
        *samples, n = self.raised.shape
        high, low = self.raised_by.max(), self.lowered_by.min()
        return f"TopLogits(samples {samples}, {n} entries raised and lowered; derivatives from {low:.4g} to {high:.4g})"


class Movement(NamedTuple):
    """A model's output and its derivative along a direction in parameter space."""

    output: Tensor  # [B, ...]
    derivative: Tensor  # [B, ...] per unit of δ

    def __repr__(self) -> str:
        """Return the output's shape and the largest |derivative|."""
        return f"Movement(output {list(self.output.shape)}; largest |derivative| {self.derivative.abs().max():.4g})"


def top_logits(
    model: nn.Module,
    decomposition: Subnetworks,
    index: int,
    inputs: Any,
    n: int = 10,
    *,
    method: str = "forward",
    any_weights: bool = False,
) -> TopLogits:
    """Return the n logits that subnetwork `index` raises and lowers most, by d softmax(f(x, W0 + δ Vout))/dδ at δ = 0.

    Args:
        model: the decomposed model, whose output is logits: [B, classes], or [B, T, vocabulary].
        decomposition: of the model's parameters.
        index: of the subnetwork. Its sign is arbitrary, so both directions are returned.
        inputs: one batch, as the model takes it.
        n: number of entries in each direction.
        method: "forward" for forward-mode differentiation. "double_backward" for a model with an operation that has no
            forward mode: it differentiates a vector-Jacobian product by its vector, at about three times the cost.
        any_weights: accept a model whose weights differ from the decomposed ones; otherwise that raises ValueError.

    Raises ValueError for arguments out of range, and RuntimeError that names the operation without forward mode.

    >>> from l3d.decomposition.subnetworks import Subnetworks
    >>> model = nn.Linear(4, 3)
    >>> d = Subnetworks({name: p.shape for name, p in model.named_parameters()}, 2, rank=1)
    >>> top_logits(model, d, 0, torch.randn(5, 4), n=2).raised.shape
    torch.Size([5, 2])
    """
    check_index(index, decomposition.n_subnetworks)
    direction = decomposition.subnetwork(index)
    if not any_weights:
        check_identity(decomposition.base_model, dict(model.named_parameters(remove_duplicate=False)))
    moved = softmax_movement(move(model, direction, inputs, method))
    if not 1 <= n <= moved.shape[-1]:
        raise ValueError(f"n: expected between 1 and the output's {moved.shape[-1]} entries, got {n}")
    raised, lowered = moved.topk(n), moved.topk(n, largest=False)
    return TopLogits(raised.indices, raised.values, lowered.indices, lowered.values)


def move(model: nn.Module, direction: Mapping[str, Tensor], inputs: Any, method: str = "forward") -> Movement:
    """Return the output on a batch and its derivative along {name: tensor of the parameter's shape}; see top_logits."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    check_fixed(model)
    named = parameters_of(model, {name: tensor.shape for name, tensor in direction.items()})
    weights = tuple(named[name].detach() for name in direction)
    tangents = tuple(tensor.detach().to(named[name]) for name, tensor in direction.items())
    inputs = to_device(inputs, weights[0].device)

    def forward(*changed: Tensor) -> Tensor:
        return output_with(model, dict(zip(direction, changed, strict=True)), inputs)

    # the fused attention kernels have neither forward mode nor second derivatives; the MATH backend has both
    with torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH):
        if method == "double_backward":
            return Movement(*torch.autograd.functional.jvp(forward, weights, tangents))
        try:
            with torch.no_grad():
                return Movement(*jvp(forward, weights, tangents))
        except (RuntimeError, NotImplementedError) as error:
            if "forward" not in str(error).lower() and "jvp" not in str(error).lower():
                raise
            reason = " ".join(str(error).split())
            raise RuntimeError(
                f"model: an operation has no forward-mode derivative; pass method='double_backward' ({reason})"
            ) from error


def softmax_movement(moved: Movement) -> Tensor:
    """Return the derivative of softmax(output), p (o' − Σ p o'), where o' is the output's derivative: [B, ..., V]."""
    p = moved.output.softmax(-1)
    return p * (moved.derivative - (p * moved.derivative).sum(-1, keepdim=True))


def move_many(model: nn.Module, directions: Mapping[str, Tensor], inputs: Any, method: str = "forward") -> Movement:
    """Return the outputs and derivatives of C batches, each along a direction of its own: [C, B, ...].

    directions: {name: [C, *shape]}; inputs: a batch with one more dimension, [C, B, ...]. If vmap can batch the model,
    all C run together, in a fraction of the time; otherwise one after another.
    """
    if method == "forward":
        try:
            with torch.inference_mode(False):
                return Movement(*vmap(lambda one, batch: tuple(move(model, one, batch)))(dict(directions), inputs))
        except (RuntimeError, ValueError, NotImplementedError):
            pass  # vmap cannot batch control flow on values; any other error is raised again by the loop
    count = len(next(iter(directions.values())))
    each = [move(model, {n: d[c] for n, d in directions.items()}, _at(inputs, c), method) for c in range(count)]
    return Movement(*(torch.stack(parts) for parts in zip(*each, strict=True)))


def _at(inputs: Any, index: int) -> Any:
    return {k: v[index] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[index]
