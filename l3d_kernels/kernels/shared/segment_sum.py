"""Sum the rows that share a key, without atomics: the gradient of an embedding.

    out[i] = Σ_{j: key[j] = i} rows[j]      rows [J, C], key [J] -> [I, C];  zeros(I, C).index_add_(0, key, rows)

A stable sort brings equal keys together. The program at the first row of a key sums that key's rows in their order, so
that the result is the same on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.ahead_of_time import CompileCase, cases_of_kernel
from l3d_kernels.kernels.shared.device import load, store, zeros
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch


@triton.jit
def segment_sum(
    out_ptr,  # [I, C]
    addend_ptr,  # [J, C]
    key_ptr,  # [J] int64, sorted
    order_ptr,  # [J] int64, the sorted keys' rows
    stop_ptr,  # [J] int64, where each sorted key's segment ends
    I,
    C,
    BLOCK_COLS: tl.constexpr,
):
    """Sum one key's rows, if this program's row is the first of them."""
    first = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask_c = offs_c < C
    key = tl.load(key_ptr + first)
    previous = tl.load(key_ptr + first - 1, mask=first > 0, other=-1)
    if (key != previous) & (key < I):
        total = tl.sum(zeros(addend_ptr, BLOCK_COLS, 1), 1)
        stop = tl.load(stop_ptr + first).to(tl.int32)
        for place in range(first, stop):
            row = tl.load(order_ptr + place)
            total += load(addend_ptr + row * C + offs_c, mask_c)  # [C]
        store(out_ptr + key * C + offs_c, total, mask_c)


TABLE["segment_sum"] = {("interpreter", None): Launch({"BLOCK_COLS": 16}), (None, None): Launch({"BLOCK_COLS": 512})}


def sum_by_key(rows: Tensor, key: Tensor, n_keys: int) -> Tensor:
    """Launch the sum: rows [J, C], key [J] integers below n_keys -> [n_keys, C]."""
    J, C = rows.shape
    out = rows.new_zeros(n_keys, C)
    ordered, order = torch.sort(key.long(), stable=True)
    stop = torch.searchsorted(ordered, ordered, right=True)
    row = common.row_for(segment_sum, rows)
    pointers = {"out_ptr": out, "addend_ptr": rows, "key_ptr": ordered, "order_ptr": order, "stop_ptr": stop}
    common.launch(segment_sum, (J, *row.tiles(COLS=C)), row, rows.device, I=n_keys, C=C, **pointers)
    return out


def compile_cases(kind: str) -> list[CompileCase]:
    """Return every form in which the kernel is launched on a kind of device."""
    return cases_of_kernel(segment_sum, kind)
