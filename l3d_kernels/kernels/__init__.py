"""The operations as Triton kernels, one file an operation; imported at the first call that wants one.

Every file has the same order: formula and shapes, kernels, launch, autograd function, registration. Each operation
has its twin of the same name in `l3d_kernels.reference`, which is its specification.
"""

from l3d_kernels.kernels.decode import softmax_mean, sparse_decode, sparse_decode_weight
from l3d_kernels.kernels.energy import gram, gram_energy, gram_energy_backward, reconstruct, squared_gradient_norm
from l3d_kernels.kernels.project import (
    at,
    at_backward,
    backward,
    chunked,
    dense,
    fused,
    project,  # noqa: F401 (chooses between chunked and fused)
    tiled,  # noqa: F401 (launches dense's kernel)
    topk,
)
from l3d_kernels.kernels.shared import segment_sum
from l3d_kernels.kernels.topk import batch_topk

# each exports compile_cases(kind): what the ahead-of-time test compiles
MODULES = (
    batch_topk,
    gram,
    gram_energy,
    gram_energy_backward,
    at,
    at_backward,
    backward,
    chunked,
    dense,
    fused,
    topk,
    reconstruct,
    segment_sum,
    softmax_mean,
    sparse_decode,
    sparse_decode_weight,
    squared_gradient_norm,
)

__all__ = ["MODULES"]
