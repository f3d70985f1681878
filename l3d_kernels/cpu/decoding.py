"""Decode sparse codes, and average the rows of a linear head under its softmax: weighted sums of a weight's rows."""

import torch
from torch import Tensor

from l3d_kernels.splitting import pieces


def sparse_decode(indices: Tensor, values: Tensor, weight: Tensor, row_offsets: Tensor | None = None) -> Tensor:
    """Return Σ_j values[a, j] weight[indices[a, j]] for every code: [A, D], by torch's embedding_bag."""
    if row_offsets is None:
        n_codes, per_code = indices.shape
        row_offsets = torch.arange(n_codes + 1, device=indices.device) * per_code
        indices, values = indices.flatten(), values.flatten()
    return torch.nn.functional.embedding_bag(
        indices, weight, row_offsets, mode="sum", per_sample_weights=values, include_last_offset=True
    )


def softmax_mean(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return softmax(hidden weightᵀ + bias) weight, a piece of the vocabulary at a time: [S, D].

    The sums so far decay by exp(maximum before − maximum now) as the running maximum of the logits grows. They are
    kept in float32 or wider.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    mean = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    highest, total = mean.new_full((len(hidden), 1), -torch.inf), mean.new_zeros(len(hidden), 1)
    for piece in pieces(len(weight), 8 * len(hidden)):  # short enough to stay in a cache from one line to the next
        part = weight[piece]
        logits = (hidden @ part.mT).to(wide)
        if bias is not None:
            logits += bias[piece]
        above = torch.maximum(highest, logits.amax(1, keepdim=True))
        finite = above.clamp_min(torch.finfo(wide).min)  # all logits so far may be -inf, in a masked vocabulary
        decay, exponentials = (highest - finite).exp_(), logits.sub_(finite).exp_()
        total = total * decay + exponentials.sum(1, keepdim=True)
        mean = mean * decay + exponentials.to(weight.dtype) @ part
        highest = above
    return (mean / total).to(hidden.dtype)
