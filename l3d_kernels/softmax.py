"""The gradient of a KL divergence at the input of a linear head, without the vocabulary's array."""

import torch
from torch import Tensor

from l3d_kernels.dispatch import check_alike, implementation


def softmax_mean(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Return μ_s = Σ_v softmax(hidden_s . weight_v + bias_v) weight_v, the mean row of the head: [S, D].

    Args:
        hidden: [S, D] what the head saw.
        weight: [V, D] the head; rows of a slice for a sliced vocabulary.
        bias: [V] or None.
        backend: "auto", "torch" or "triton".

    The gradient of KL(softmax(reference) ‖ softmax(logits)) at `hidden` is μ less the reference's μ. One pass over the
    vocabulary; no [S, V] array is formed. Not differentiable. Raises ValueError on shapes that do not belong together.

    >>> softmax_mean(torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    tensor([[0.5000, 1.5000]])
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected shape [S, D], got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        raise ValueError(f"weight: expected shape [V, {hidden.shape[1]}] with V at least 1, got {list(weight.shape)}")
    check_alike(hidden=hidden, weight=weight, **({} if bias is None else {"bias": bias}))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape [{len(weight)}], got {list(bias.shape)}")
    if torch.is_grad_enabled() and hidden.requires_grad:
        raise ValueError("hidden: softmax_mean is not differentiable; detach it")
    with torch.no_grad():
        return implementation("softmax_mean", backend, hidden)(hidden, weight, bias)
