"""Device functions that kernels share, by kernels of a line each."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from l3d_kernels.kernels.shared import common, device
from l3d_kernels.kernels.shared.launch_table import Launch


@triton.jit
def rounding(out_ptr, in_ptr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out_ptr + places, device.round_to_tf32(tl.load(in_ptr + places)))


def as_a_matrix_unit_reads(values: Tensor) -> Tensor:
    """Drop the 13 bits of float32 that tf32 has not."""
    return (values.view(torch.int32) & ~0x1FFF).view(torch.float32)


def rounded(values: Tensor) -> Tensor:
    """Round to 11 significant bits, halves away from zero, in float64."""
    mantissa, exponent = torch.frexp(values.double())
    scaled = mantissa * 2**11
    return torch.ldexp(scaled.sign() * (scaled.abs() + 0.5).floor() / 2**11, exponent)


def test_rounding_to_tf32() -> None:
    """What matrix units read is the nearest number of tf32: numbers of all sizes, halves, zeros, NaN and infinity."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1000, generator=generator) * 10.0 ** torch.randint(-30, 30, (1000,), generator=generator)
    halves = torch.tensor([1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11, 1 - 2.0**-12, 2 - 2.0**-12])
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)  # the first is a GPU's
    special = torch.cat([torch.tensor([0.0, -0.0, torch.inf, -torch.inf]), nan])
    values = torch.cat([drawn, halves, special, torch.zeros(1024 - 1000 - len(halves) - len(special))])
    out = torch.empty_like(values)
    rounding[(1,)](out, values, SIZE=1024)
    seen = as_a_matrix_unit_reads(out)
    finite = values.isfinite()
    assert torch.equal(seen[finite].double(), rounded(values[finite]))
    assert torch.equal(seen[~finite].nan_to_num(), values[~finite].nan_to_num())
    assert torch.equal(seen.isnan(), values.isnan())
    # that is, half a unit in the last place at most, and no bias: dropping the bits makes every number smaller
    errors = (seen[finite].double() - values[finite].double()) / values[finite].double().abs().clamp_min(1e-300)
    assert errors.abs().max() <= 2.0**-11
    assert errors.mul(values[finite].sign()).mean().abs() < 2.0**-15


def test_a_grid_that_no_gpu_takes_is_refused() -> None:
    """One line, before anything runs."""
    row = Launch({"SIZE": 1}, 1, 1)
    values, out = torch.ones(1), torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"rounding: expected a grid of at most 65535 .* got \(1, 65536\); pass backend='torch'"
    ):
        common.launch(rounding, (1, 65_536), row, values.device, out_ptr=out, in_ptr=values)
    assert out == 0
