"""Divide directions by their norms in place: one number read and one written for each parameter that moves.

    p_k ← squared_norms_k^(−1 / 2n) p_k      [K, ...], n the number of factors that share a tensor's norm

Slices that rest keep their bits. Specification: `l3d_kernels.reference.rescale`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.cpu.update import shared_factors
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import load, store
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch


@triton.jit
def rescale_slices(
    parameter_ptr,  # [K, N], written
    factor_ptr,  # [K] wide
    moves_ptr,  # [K] wide
    N,
    tiles,
    BLOCK: tl.constexpr,
):
    """Multiply a tile of one slice by the slice's factor."""
    k, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if tl.load(moves_ptr + k) != 0:
        offs_n = tile * BLOCK + tl.arange(0, BLOCK)
        places, mask = parameter_ptr + k.to(tl.int64) * N + offs_n, offs_n < N
        factor = tl.load(factor_ptr + k)
        store(places, load(places, mask).to(factor.dtype) * factor, mask)


TABLE["rescale_slices"] = {("interpreter", None): Launch({"BLOCK": 32}), (None, None): Launch({"BLOCK": 2048})}


@common.operator("rescale", lambda *_: None, mutates=("parameters",))
def rescale_all(parameters: Sequence[Tensor], factors: Sequence[Tensor], moves: Tensor) -> None:
    """Launch the kernel for each tensor, with its factors [K]."""
    for parameter, factor in zip(parameters, factors, strict=True):
        row = common.row_for(rescale_slices, parameter)
        size = parameter[:1].numel()
        tiles = common.ceil_div(size, row.blocks["BLOCK"])
        pointers = {"parameter_ptr": parameter, "factor_ptr": factor, "moves_ptr": moves}
        grid = (len(parameter) * tiles,)
        common.launch(rescale_slices, grid, row, parameter.device, N=size, tiles=tiles, **pointers)


def rescale(
    parameters: Sequence[Tensor], squared_norms: Tensor, shares: Sequence[int], moves: Tensor | None = None
) -> None:
    """Run `l3d_kernels.reference.rescale` with Triton kernels."""
    factors = shared_factors(squared_norms, shares)
    rescale_all(
        list(parameters), [factors[n] for n in shares], torch.ones_like(squared_norms) if moves is None else moves
    )


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernel is launched on a kind of device."""
    return cases_of_kernel(rescale_slices, kind)
