"""The operations as Triton kernels, one file an operation; imported at the first call that wants one.

Every file has the same order: formula and shapes, kernels, launch, autograd function, registration. Each operation
has its twin of the same name in `l3d_kernels.reference`, which is its specification.
"""

from l3d_kernels.kernels import (
    batch_topk,
    gram,
    gram_energy,
    gram_energy_backward,
    project,  # noqa: F401 (chooses between project_chunked and project_fused)
    project_at,
    project_at_backward,
    project_backward,
    project_chunked,
    project_dense,
    project_fused,
    project_tiled,  # noqa: F401 (launches project_dense's kernel)
    project_topk,
    reconstruction,
    segments,
    softmax_mean,
    sparse_decode,
    sparse_decode_weight,
    squared_gradient_norm,
)

# each exports compile_cases(kind): what the ahead-of-time test compiles
MODULES = (
    batch_topk,
    gram,
    gram_energy,
    gram_energy_backward,
    project_at,
    project_at_backward,
    project_backward,
    project_chunked,
    project_dense,
    project_fused,
    project_topk,
    reconstruction,
    segments,
    softmax_mean,
    sparse_decode,
    sparse_decode_weight,
    squared_gradient_norm,
)

__all__ = ["MODULES"]
