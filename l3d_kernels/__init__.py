"""Compute with per-sample gradients and sparse low-rank directions: tensors in, tensors out, no model known.

`l3d_kernels.ops` documents every op, `l3d_kernels.update` those that change tensors in place. `l3d_kernels.reference`
defines each by its formula, `l3d_kernels.cpu` runs it in plain torch and `l3d_kernels.kernels` in Triton;
`backend="auto" | "torch" | "triton"` chooses, call by call.
"""

from l3d_kernels.ops import (
    batch_topk,
    gram,
    gram_energy,
    gram_energy_coactive,
    project,
    project_at,
    project_dense,
    project_tiled,
    project_topk,
    reconstruct,
    softmax_mean,
    sparse_decode,
    squared_gradient_norm,
    squared_residual_norm,
)
from l3d_kernels.sparse import SparseCoefficients
from l3d_kernels.update import adam_step, rescale

__all__ = [
    "SparseCoefficients",
    "adam_step",
    "batch_topk",
    "gram",
    "gram_energy",
    "gram_energy_coactive",
    "project",
    "project_at",
    "project_dense",
    "project_tiled",
    "project_topk",
    "reconstruct",
    "rescale",
    "softmax_mean",
    "sparse_decode",
    "squared_gradient_norm",
    "squared_residual_norm",
]
