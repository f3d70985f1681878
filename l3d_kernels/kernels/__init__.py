"""Run the ops as Triton kernels; imported at the first call that wants one.

In come an op's tensors, out goes what its definition in `l3d_kernels.reference` gives. Every kernel file has the same
order: formula and shapes, kernels, launch table, launch, gradients, public function. Read `project.fused` first for a
kernel and `project.project` for how an op is put together.
"""

from l3d_kernels.kernels.decode import softmax_mean, sparse_decode, sparse_decode_weight
from l3d_kernels.kernels.energy import gram, gram_energy, gram_energy_backward, reconstruct, squared_gradient_norm
from l3d_kernels.kernels.project import at, at_backward, backward, chunked, dense, fused, project, tiled, topk  # noqa: F401
from l3d_kernels.kernels.shared import device, segment_sum
from l3d_kernels.kernels.shared.path_table import torch_is_faster  # noqa: F401 (the registry asks it)
from l3d_kernels.kernels.topk import batch_topk

INTERPRETED = bool(device.INTERPRETED.value)  # the kernels run in Triton's interpreter

# Each has compile_cases(kind): what the ahead-of-time test compiles. `project` and `tiled` launch the others' kernels.
ENERGY = (gram, gram_energy, gram_energy_backward, reconstruct, squared_gradient_norm)
PROJECT = (at, at_backward, backward, chunked, dense, fused, topk)
MODULES = (batch_topk, *ENERGY, *PROJECT, segment_sum, softmax_mean, sparse_decode, sparse_decode_weight)
