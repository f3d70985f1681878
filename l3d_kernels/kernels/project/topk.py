"""Project and select in one go: the projection's epilogue counts the histogram that batch top-k starts from.

    kept = batch_topk(base + project(x, dy, left, right), n)      shapes as in `l3d_kernels.kernels.project.project`

The first digit of every |c| is counted while c is in registers, so that the radix selection reads the coefficients
once less. The backward pass sees the kept pairs only: it is that of `project_at`.
"""

from typing import Any

import torch
from torch import Tensor

from l3d_kernels.dispatch import TRITON
from l3d_kernels.kernels.project import chunked as project_chunked
from l3d_kernels.kernels.project import fused as project_fused
from l3d_kernels.kernels.project import project
from l3d_kernels.kernels.project.at_backward import project_at_backward
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.topk import batch_topk, radix
from l3d_kernels.sparse import SparseCoefficients

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _no_launch(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, n: int, base: Tensor | None) -> Parts:
    S, K = dy.shape[0], left.shape[0]
    indices = [dy.new_empty(size, dtype=torch.int64) for size in (n, n, S + 1, n, K + 1)]
    return dy.new_empty(n), indices[0], indices[1], indices[2], indices[3], indices[4], dy.new_empty(())


@common.operator("project_topk", _no_launch)
def project_topk_forward(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, n: int, base: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the projection and the selection: the tensors of SparseCoefficients."""
    histogram = radix.first_histogram(dy.dtype, dy.device)
    dense = project.coefficients(x, dy, left, right, base, histogram)
    return batch_topk.select(dense, n, histogram)


class _ProjectTopk(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, n: int, base: Tensor | None) -> Parts:
        return project_topk_forward(x, dy, left, right, n, base)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
        _, rows, _, _, column_order, column_offsets, _ = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:4], column_order, column_offsets, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_values: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_left, d_right = project_at_backward(d_values, *ctx.saved_tensors)
        return None, None, d_left, d_right, None, None


def project_topk(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, n: int, base: Tensor | None) -> SparseCoefficients:
    """Run `l3d_kernels.reference.project_topk` with Triton kernels."""
    floats = common.autocast_alike(*(t for t in (x, dy, left, right) if t.is_floating_point()))
    x, dy, left, right = floats if len(floats) == 4 else (x.contiguous(), *floats)
    base = None if base is None else base.to(dy.dtype).contiguous()
    parts: Parts = _ProjectTopk.apply(x, dy, left, right, n, base)
    return SparseCoefficients(*parts, shape=(dy.shape[0], left.shape[0]))


TRITON["project_topk"] = project_topk


def compile_cases(kind: str) -> list[common.CompileCase]:
    """Return the forms of the projection's kernels that count and add; most are left to the long test."""
    cases = project_fused.compile_cases(kind, count=True)
    cases = [case._replace(long=case.long or case.constants["SLOT_T"] != 1) for case in cases]
    return cases + project_chunked.compile_cases(kind, count=True)


def counting_cases(kind: str, largest: int) -> list[common.CompileCase]:
    """Return the forms that count for any T and R from 1 to `largest`, each once."""
    sizes = range(1, largest + 1)
    lines = {project_fused.slots(size, 128) for size in sizes}
    tiles = [(slot_t, slot_r) for slot_t in sorted(lines) for slot_r in sorted(lines)]
    ranks = sorted({project_chunked.slot(size, 256) for size in sizes})
    return project_fused.compile_cases(kind, True, tiles) + project_chunked.compile_cases(kind, True, ranks)
