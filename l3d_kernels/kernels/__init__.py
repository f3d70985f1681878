"""Run the ops as Triton kernels; imported at the first call that wants one.

In come an op's tensors, out goes what its definition in `l3d_kernels.reference` gives. Every kernel file has the same
order: formula and shapes, kernels, launch table, launch, gradients, public function. Read `project.fused` first for a
kernel and `project.project` for how an op is put together.
"""

from l3d_kernels import registry
from l3d_kernels.kernels.decode import softmax_mean, sparse_decode, sparse_decode_weight
from l3d_kernels.kernels.energy import gram, gram_energy, gram_energy_backward, reconstruct, squared_gradient_norm
from l3d_kernels.kernels.project import at, at_backward, backward, chunked, dense, fused, project, tiled, topk
from l3d_kernels.kernels.shared import segment_sum
from l3d_kernels.kernels.topk import batch_topk
from l3d_kernels.kernels.update import adam, rescale

PROJECTIONS = (project.project, tiled.project_tiled, at.project_at, dense.project_dense, topk.project_topk)
SELECTIONS = (batch_topk.batch_topk, batch_topk.batch_topk_over_ranks)
ENERGIES = (gram.gram, gram_energy.gram_energy, gram_energy.gram_energy_coactive)
NORMS = (squared_gradient_norm.squared_gradient_norm, reconstruct.squared_residual_norm, reconstruct.reconstruct)
DECODERS = (sparse_decode.sparse_decode, softmax_mean.softmax_mean)
UPDATES = (adam.adam_step, rescale.rescale)
for op in (*PROJECTIONS, *SELECTIONS, *ENERGIES, *NORMS, *DECODERS, *UPDATES):
    registry.TRITON[op.__name__] = op

# Each has compile_cases(kind): what the ahead-of-time test compiles.
PROJECT = (at, at_backward, backward, chunked, dense, fused, topk)
ENERGY = (gram, gram_energy, gram_energy_backward, reconstruct, squared_gradient_norm)
DECODE = (softmax_mean, sparse_decode, sparse_decode_weight)
MODULES = (adam, batch_topk, *ENERGY, *PROJECT, rescale, segment_sum, *DECODE)
