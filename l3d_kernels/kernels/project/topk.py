"""Project and select together: the projection's epilogue counts the histogram that batch top-k starts from.

    kept = batch_topk(base + project(x, dy, left, right), n)      shapes as in `l3d_kernels.kernels.project.project`

The first digit of every |c| is counted while c is in registers, so that the radix selection reads the coefficients once
less. The backward pass needs the kept pairs only: it is that of `project_at`. Specification:
`l3d_kernels.reference.project_topk`.
"""

from torch import Tensor

from l3d_kernels.kernels.project import chunked as project_chunked
from l3d_kernels.kernels.project import fused as project_fused
from l3d_kernels.kernels.project import project
from l3d_kernels.kernels.project.at_backward import project_at_backward
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase
from l3d_kernels.kernels.topk import batch_topk, radix
from l3d_kernels.kernels.topk.batch_topk import Parts
from l3d_kernels.sparse import SparseCoefficients


def _fake_parts(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, n: int, base: Tensor | None) -> Parts:
    return batch_topk.parts_for(dy.new_empty(dy.shape[0], left.shape[0]), n)


@common.operator("project_topk", _fake_parts)
def project_topk_forward(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, n: int, base: Tensor | None) -> Parts:
    """Launch the projection and the selection: the tensors of SparseCoefficients."""
    histogram = radix.first_histogram(dy.dtype, dy.device)
    dense = project.coefficients(x, dy, left, right, base, histogram)
    return batch_topk.select(dense, n, histogram)


_project_topk = common.differentiable(
    lambda x, dy, left, right, n, base: project_topk_forward(x, dy, left, right, n, base),
    lambda needs, saved, d_values: [None, None, *project_at_backward(d_values, *saved)],
    lambda inputs, output: (*inputs[:4], output[4], output[5], output[1]),  # column order and offsets, and rows
)


def project_topk(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, n: int, base: Tensor | None) -> SparseCoefficients:
    """Run `l3d_kernels.reference.project_topk` with Triton kernels."""
    x, dy, left, right = common.contiguous(x, dy, left, right)
    base = None if base is None else base.to(dy.dtype).contiguous()
    parts: Parts = _project_topk(x, dy, left, right, n, base)
    return SparseCoefficients(*parts, shape=(dy.shape[0], left.shape[0]))


def compile_cases(kind: str) -> list[CompileCase]:
    """Return the forms of the projection's kernels that count and add; most are in the long test only."""
    cases = project_fused.compile_cases(kind, count=True)
    cases = [case._replace(long=case.long or case.constants["SLOT_T"] != 1) for case in cases]
    return cases + project_chunked.compile_cases(kind, count=True)


def counting_cases(kind: str, largest: int) -> list[CompileCase]:
    """Return the forms that count for any T and R from 1 to `largest`, each once."""
    sizes = range(1, largest + 1)
    lines = {project_fused.slots(size, 128) for size in sizes}
    tiles = [(slot_t, slot_r) for slot_t in sorted(lines) for slot_r in sorted(lines)]
    ranks = sorted({project_chunked.slot(size, 256) for size in sizes})
    return project_fused.compile_cases(kind, True, tiles) + project_chunked.compile_cases(kind, True, ranks)
