"""Run every op in plain torch, fast on a CPU: in come an op's tensors, out goes what its definition gives.

Results and gradients are those of the op's definition in `l3d_kernels.reference`, which tests hold them to; what is
added here is speed and small memory: the cheaper of several paths by counted cost, temporaries cut into pieces,
selection by numpy (ten times as fast as torch on a CPU) and hand-written backward passes. Those are plain torch, so
that with create_graph=True they are differentiable again; the pieces then stay in memory.
Any floating dtype and any device are taken, and nothing imports triton. Read `projection` first.
"""

# ruff: noqa: F401 (the ops by their names, as in `l3d_kernels.reference`)

from l3d_kernels.cpu.decoding import softmax_mean, sparse_decode
from l3d_kernels.cpu.energy import (
    energy_by_tiles,
    energy_from_gram,
    gram,
    gram_energy,
    gram_energy_coactive,
    squared_gradient_norm,
)
from l3d_kernels.cpu.projection import project, project_at, project_dense, project_tiled
from l3d_kernels.cpu.reconstruction import reconstruct, squared_residual_norm
from l3d_kernels.cpu.selection import (
    batch_topk,
    batch_topk_over_columns,
    batch_topk_over_ranks,
    largest,
    largest_of_array,
    project_topk,
)
from l3d_kernels.cpu.update import adam_step, rescale
