"""Kernels for sparse low-rank decompositions of per-sample gradients: tensors in, tensors out, no model known.

Every op takes backend="auto" | "torch" | "triton" and has its plain-torch twin in `l3d_kernels.reference`.
"""

from l3d_kernels.decode import sparse_decode
from l3d_kernels.energy import (
    gram,
    gram_energy,
    gram_energy_coactive,
    reconstruct,
    squared_gradient_norm,
    squared_residual_norm,
)
from l3d_kernels.projection import project, project_at, project_dense, project_tiled, project_topk
from l3d_kernels.softmax import softmax_mean
from l3d_kernels.sparse import SparseCoefficients
from l3d_kernels.topk import batch_topk

__all__ = [
    "SparseCoefficients",
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
    "softmax_mean",
    "sparse_decode",
    "squared_gradient_norm",
    "squared_residual_norm",
]
