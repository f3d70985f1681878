"""Coefficients of every sample and subnetwork, from the factors of the gradients.

    c[s, k] = Σ_t Σ_r (x[b, t] . right[k, r]) (dy[s, t] . left[k, r]),  b = s // (S // B)      [S, K]

    x [B, T, I] or integers [B, T], dy [S, T, O], left [K, R, O], right [K, R, I]
    einsum("sti,kri,sto,kro->sk", x.repeat_interleave(S // B, 0), right, dy, left)

Two paths lead there: one kernel that keeps both products in registers (`project_fused`), and library products a chunk
at a time with a small kernel behind them (`project_chunked`). `paths` has the table by which one is taken.
"""

from typing import Any

import torch
from torch import Tensor

from l3d_kernels.dispatch import TRITON
from l3d_kernels.kernels.project import chunked as project_chunked
from l3d_kernels.kernels.project import fused as project_fused
from l3d_kernels.kernels.project.backward import project_backward
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.path_table import CHUNKED, FUSED, path_of, width_class

PATHS = {FUSED: project_fused.coefficients, CHUNKED: project_chunked.coefficients}


def coefficients(
    x: Tensor,
    dy: Tensor,
    left: Tensor,
    right: Tensor,
    base: Tensor | None,
    histogram: Tensor | None,
    path: str | None = None,
) -> Tensor:
    """Launch a path: `base` plus the coefficients, [S, K]; `histogram` counts their magnitudes."""
    if path is None:
        path = path_of("project", dy.device, dy.dtype, width_class(dy.shape[2]))
    return PATHS.get(path, project_fused.coefficients)(x, dy, left, right, base, histogram)


def _no_forward(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, path: str | None) -> Tensor:
    return dy.new_empty(dy.shape[0], left.shape[0])


@common.operator("project", _no_forward)
def project_forward(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, path: str | None) -> Tensor:
    """Launch the forward pass: [S, K]."""
    return coefficients(x, dy, left, right, None, None, path)


# --- autograd ---------------------------------------------------------------------------------------------------


class _Project(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, path: str | None) -> Tensor:
        return project_forward(x, dy, left, right, path)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:4])
        grads = project_backward(d_out, *ctx.saved_tensors, needs)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


def project(x: Tensor, dy: Tensor, left: Tensor, right: Tensor, path: str | None = None) -> Tensor:
    """Run `l3d_kernels.reference.project` with Triton kernels, by the path that the table names, or by `path`."""
    if x.is_floating_point():
        return _Project.apply(*common.autocast_alike(x, dy, left, right), path)
    return _Project.apply(x.contiguous(), *common.autocast_alike(dy, left, right), path)


TRITON["project"] = project
