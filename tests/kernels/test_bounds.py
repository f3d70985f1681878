"""No kernel writes beyond its output, even where the counts or offsets that it is given are wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from l3d_kernels.kernels import MODULES
from l3d_kernels.kernels.decode import sparse_decode
from l3d_kernels.kernels.energy import gram_energy
from l3d_kernels.kernels.energy import reconstruct as reconstruction
from l3d_kernels.kernels.project import at as project_at
from l3d_kernels.kernels.project import pairs
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared import segment_sum as segments
from l3d_kernels.kernels.topk import batch_topk, radix

from tools import normal

GUARD = 32  # elements behind every output


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Lay a strip of known elements behind every output; return how many of them were written."""
    strips: list[Tensor] = []

    def empty(shape: Any, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        size = int(torch.Size(shape).numel())
        memory = torch.full((size + GUARD,), 77, dtype=dtype or like.dtype)
        strips.append(memory[size:])
        return memory[:size].view(tuple(shape))

    for module in (*MODULES, common, pairs):
        if hasattr(module, "empty"):
            monkeypatch.setattr(module, "empty", empty)

    def written() -> int:
        assert strips, "no output was made"
        return sum(int((strip != 77).sum()) for strip in strips)

    return written


def padded(values: Tensor, n: int) -> Tensor:
    """Return the first n of the values; the others stay behind them in memory."""
    return values[:n]


def test_top_k_with_a_wrong_count(guards: Callable[[], int]) -> None:
    """More entries are above the threshold than the outputs hold: a histogram that was counted wrongly."""
    coefficients = normal(9, 40, dtype=torch.float32)
    histogram, state = radix.first_histogram(torch.float32, coefficients.device), radix.begin(60, coefficients.device)
    histogram, state = radix.digit_histogram(coefficients, 0, state)
    for digit in (1, 2):
        histogram, state = radix.digit_histogram(coefficients, digit, state, histogram)
    bits, row_counts, column_counts, state = batch_topk._count(coefficients, histogram, state)
    starts, limit = batch_topk._scan_rows(coefficients, bits, row_counts, state, torch.zeros_like(state[:1]))
    assert limit[1] == 60
    parts = batch_topk._write(coefficients, 50, bits, column_counts, starts, state, limit)
    assert guards() == 0
    assert len(parts[0]) == 50


def test_row_offsets_beyond_the_entries(guards: Callable[[], int]) -> None:
    """The squared norm of reconstructions, and a decoder's gradient, where the last row claims entries that are not."""
    left, right = normal(3, 2, 5), normal(3, 2, 4)
    values, columns = padded(normal(12), 8), padded(torch.arange(12) % 3, 8)
    offsets = torch.tensor([0, 4, 12])
    gram_energy.energy_forward(values, columns, offsets, [left], [right])
    sparse_decode.d_values(normal(2, 6), columns, normal(3, 6), offsets)
    assert guards() == 0


def test_entries_beyond_the_values(guards: Callable[[], int]) -> None:
    """The gradient to reconstructions' coefficients where the column order names entries that are not."""
    left, right, d_out = normal(2, 2, 5), normal(2, 2, 4), normal(3, 5, 4)
    order = torch.tensor([0, 9, 1, 2, 8, 3])
    values, rows = padded(normal(12), 6), padded(torch.zeros(12, dtype=torch.int64), 6)
    reconstruction.side_backward(d_out, values, rows, order, torch.tensor([0, 3, 6]), left, right, True)
    assert guards() == 0


def test_pairs_beyond_the_kept(guards: Callable[[], int]) -> None:
    """The coefficients at kept pairs where the column offsets claim more pairs than there are."""
    x, dy, left, right = normal(4, 2, 5), normal(4, 2, 6), normal(3, 2, 6), normal(3, 2, 5)
    rows = padded(torch.arange(40) % 4, 6)
    project_at.project_at_forward(x, dy, left, right, torch.arange(6), torch.tensor([0, 2, 4, 20]), rows)
    assert guards() == 0


def test_keys_beyond_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose key names no row of the output are left out."""
    rows, memory = normal(3, 4), torch.full((8, 4), 77.0, dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda self, *shape: memory[: shape[0]].zero_())
    out = segments.sum_by_key(rows, torch.tensor([1, 0, 5]), 2)
    assert torch.equal(out, rows[[1, 0]])
    assert bool((memory[2:] == 77).all())
