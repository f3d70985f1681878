"""Run the ops as Triton kernels; imported at the first call that wants one.

In come an op's tensors, out goes what its definition in `l3d_kernels.reference` gives. Every kernel file has the same
order: formula and shapes, kernels, launch table, launch, gradients, public function. Read `project.fused` first for a
kernel and `project.project` for how an op is put together.
"""

from l3d_kernels import registry
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
from l3d_kernels.kernels.shared import device, path_table, segment_sum
from l3d_kernels.kernels.topk import batch_topk

# Each has compile_cases(kind): what the ahead-of-time test compiles.
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

registry.register(registry.Kernels(bool(device.INTERPRETED.value), path_table.torch_is_faster))

__all__ = ["MODULES"]
