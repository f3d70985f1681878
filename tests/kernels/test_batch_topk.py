"""Batch top-k by radix selection: every field as the twin's, whatever the ties, the dtype or the number of ranks."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.shared import device
from l3d_kernels.kernels.topk import batch_topk, radix

from tools import DTYPES, launches, normal, strided
from topk_cases import together

KERNELS = ("topk_histogram", "topk_count", "topk_scan_rows", "topk_scan_columns", "topk_write")


def assert_same(kept: lk.SparseCoefficients, expected: lk.SparseCoefficients) -> None:
    """Every field has the same dtype and the same bits."""
    assert kept.shape == expected.shape
    for name, own, other in zip(kept._fields[:-1], kept[:-1], expected[:-1], strict=True):
        assert own.dtype == other.dtype, name
        assert torch.equal(own.nan_to_num(nan=9e4), other.nan_to_num(nan=9e4)), f"{name}: {own} != {other}"


def hold(coefficients: Tensor, n: int) -> None:
    """Hold the kernels to the twin, and prove that they were launched."""
    with launches(*(KERNELS if n else ())):
        kept = lk.batch_topk(coefficients, n, backend="triton")
    assert_same(kept, lk.batch_topk(coefficients, n, backend="torch"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (35, 70), (1, 100), (100, 1)], ids=str)
def test_keeps_what_the_twin_keeps(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Nothing, one, a tenth, all but one and everything kept, over several tiles each way."""
    coefficients = normal(*shape, dtype=dtype)
    size = coefficients.numel()
    for n in sorted({0, 1, size // 10, size - 1, size}):
        hold(coefficients, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_infinities_and_nan(dtype: torch.dtype) -> None:
    """Hundreds of ties go to the lower flat index; NaN counts as infinity and is kept."""
    coefficients = torch.randint(-3, 4, (40, 37), generator=torch.Generator().manual_seed(0)).to(dtype)
    coefficients[3, 5] = coefficients[39, 36] = torch.nan
    coefficients[20, 31] = -torch.inf
    for n in (1, 2, 3, 4, 600, 1479):
        hold(coefficients, n)


@pytest.mark.parametrize("n", range(1, 12, 2))
def test_all_entries_tied(n: int) -> None:
    """Of entries of one magnitude, zeros of both signs among them, the first n in flat order are kept."""
    hold(torch.tensor([[0.0, -0.0, 0.0, -0.0]] * 3), n)
    hold(torch.tensor([[2.0, -2.0, 2.0, -2.0]] * 3), n)


def test_strides_do_not_matter() -> None:
    """A transposed, sliced or expanded matrix is read by its logical order."""
    matrix = normal(20, 12, dtype=torch.float32)
    for coefficients in (
        matrix.mT,
        matrix[::2],
        strided(matrix),
        matrix[:1].expand(5, 12),
        matrix[:, :1].expand(20, 3),
    ):
        hold(coefficients, 11)


def test_no_samples() -> None:
    """A matrix without rows keeps nothing."""
    hold(torch.zeros(0, 5), 0)
    hold(torch.zeros(3, 0), 0)


def test_values_are_differentiable() -> None:
    """The gradient of the kept values reaches exactly the kept coefficients, as gradcheck and the twin say."""
    coefficients = normal(6, 5).requires_grad_()
    with launches(*KERNELS):
        kept = lk.batch_topk(coefficients, 7, backend="triton")
    upstream = torch.arange(1.0, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(kept.values @ upstream, coefficients)
    (expected,) = torch.autograd.grad(lk.batch_topk(coefficients, 7, backend="torch").values @ upstream, coefficients)
    assert torch.equal(grad, expected)
    assert not kept.threshold.requires_grad
    torch.autograd.gradcheck(lambda c: lk.batch_topk(c, 7, backend="triton").values, (coefficients,), fast_mode=True)


def test_same_bits_twice() -> None:
    """Two calls on the same matrix, ties and all, give the same bits in every field."""
    coefficients = torch.randint(-3, 4, (40, 40), generator=torch.Generator().manual_seed(0)).float()
    assert_same(*(lk.batch_topk(coefficients, 123, backend="triton") for _ in range(2)))


@triton.jit
def _epilogue(out_ptr, histogram_ptr, tile_ptr, size):
    """Store a float32 tile as a kernel's epilogue does, and count it."""
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tile = tl.load(tile_ptr + offs, mask=offs < size, other=0)
    device.store(out_ptr + offs, tile, offs < size)
    radix.count_magnitudes(histogram_ptr, tile, offs < size, out_ptr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_first_histogram_may_come_from_an_epilogue(dtype: torch.dtype) -> None:
    """Counted while stored, rounding included, it is the first digit's; selection then takes one pass less."""
    tile = normal(20, 12, dtype=torch.float32)
    out, histogram = torch.empty(20, 12, dtype=dtype), radix.first_histogram(dtype, tile.device)
    _epilogue[(1,)](out, histogram, tile, tile.numel())
    assert torch.equal(out, tile.to(dtype))
    assert torch.equal(histogram, radix.digit_histogram(out, 0, radix.begin(31, out.device))[0])
    with launches(*KERNELS) as with_epilogue:
        kept = batch_topk.select_one(out, 31, histogram)
    with launches(*KERNELS) as without:
        assert_same(kept, batch_topk.batch_topk(out, 31))
    assert with_epilogue["topk_histogram"] == without["topk_histogram"] - 1
    assert_same(kept, lk.batch_topk(out, 31, backend="torch"))


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_together_keep_what_one_process_keeps(ties: bool) -> None:
    """Four ranks with rows of their own, one with none: each keeps what its twin keeps, with one launch of each."""
    whole = normal(30, 9, dtype=torch.float32)
    if ties:
        whole = whole.round()
    parts = [whole[:4], whole[4:4], whole[4:21], whole[21:]]
    for n in (0, 1, 40, 270):
        with launches(*(KERNELS if n else ())):
            kept = together(parts, n, "triton")
        for own, expected in zip(kept, together(parts, n, "torch"), strict=True):
            assert_same(own, expected)
