"""Project every sample's gradient on every subnetwork's direction, from the factors of both.

    c[s, k] = Σ_t Σ_r (x[b, t] . right[k, r]) (dy[s, t] . left[k, r]),  b = s // (S // B)      [S, K]

    x [B, T, I] or integers [B, T], dy [S, T, O], left [K, R, O], right [K, R, I]
    einsum("sti,kri,sto,kro->sk", x.repeat_interleave(S // B, 0), right, dy, left)

There are two paths: one kernel that keeps both products in registers (`fused`), and library products a chunk at a time
with a small kernel after them (`chunked`). The table in `path_table` chooses. Specification:
`l3d_kernels.reference.project`.
"""

from torch import Tensor

from l3d_kernels.kernels.project import chunked as project_chunked
from l3d_kernels.kernels.project import fused as project_fused
from l3d_kernels.kernels.project.backward import project_backward
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.path_table import CHUNKED, FUSED, path_of
from l3d_kernels.registry import width_class

PATHS = {FUSED: project_fused.coefficients, CHUNKED: project_chunked.coefficients}


def coefficients(
    x: Tensor, dy: Tensor, left: Tensor, right: Tensor, base: Tensor | None, histogram: Tensor | None, path: str = ""
) -> Tensor:
    """Launch a path: `base` plus the coefficients, [S, K]; their magnitudes are counted in `histogram`."""
    path = path or path_of("project", dy.device, dy.dtype, width_class(dy.shape[2]))
    return PATHS.get(path, project_fused.coefficients)(x, dy, left, right, base, histogram)


@common.operator("project", lambda x, dy, left, right, path: dy.new_empty(dy.shape[0], left.shape[0]))
def project_forward(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, path: str | None) -> Tensor:
    """Launch the forward pass: [S, K]."""
    return coefficients(x, dy, left, right, None, None, path or "")


# --- autograd ---------------------------------------------------------------------------------------------------


_project = common.differentiable(
    lambda x, dy, left, right, path: project_forward(x, dy, left, right, path),
    lambda needs, saved, d_out: project_backward(d_out, *saved, list(needs[:4])),
    lambda inputs, output: inputs[:4],
)


def project(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, path: str | None = None) -> Tensor:
    """Run `l3d_kernels.reference.project` with Triton kernels, by the path that the table names, or by `path`."""
    return _project(*common.contiguous(x, dy, left, right), path)
