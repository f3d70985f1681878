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
from l3d_kernels.kernels.shared.device import chosen, load, store
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch


@triton.jit
def rescale_slices(
    parameter_ptrs,  # of each tensor [K, N], written
    factor_ptrs,  # [K] wide
    moves_ptr,  # [K] wide
    N_of,  # of each tensor
    start_of,  # the tiles of a slice in the tensors before it
    tiles,  # of a slice in all tensors
    BLOCK: tl.constexpr,
):
    """Multiply a tile of one slice of one tensor by the slice's factor."""
    k, place = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if tl.load(moves_ptr + k) != 0:
        N, tile = chosen(N_of, start_of, place), place - chosen(start_of, start_of, place)
        offs_n = tile * BLOCK + tl.arange(0, BLOCK)
        places = chosen(parameter_ptrs, start_of, place) + k.to(tl.int64) * N + offs_n
        mask = offs_n < N
        factor = tl.load(chosen(factor_ptrs, start_of, place) + k)
        store(places, load(places, mask).to(factor.dtype) * factor, mask)


TABLE["rescale_slices"] = {("interpreter", None): Launch({"BLOCK": 32}), (None, None): Launch({"BLOCK": 2048})}


@common.operator("rescale", lambda *_: None, mutates=("parameters",))
def rescale_all(parameters: Sequence[Tensor], factors: Sequence[Tensor], moves: Tensor) -> None:
    """Launch the kernel for tensors of a dtype together, each with its factors [K]."""
    for places in common.together((p.dtype, factor.dtype) for p, factor in zip(parameters, factors, strict=True)):
        own = [parameters[i] for i in places]
        row, sizes = common.row_for(rescale_slices, own[0]), tuple(parameter[:1].numel() for parameter in own)
        start_of, tiles = common.starts(common.ceil_div(size, row.blocks["BLOCK"]) for size in sizes)
        pointers = {"parameter_ptrs": tuple(own), "factor_ptrs": tuple(factors[i] for i in places), "moves_ptr": moves}
        place = {"N_of": sizes, "start_of": start_of, "tiles": tiles}
        common.launch(rescale_slices, (len(moves) * tiles,), row, moves.device, **pointers, **place)


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
