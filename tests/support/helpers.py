"""Share a comparison, seeded random values, a model and a tokenizer among the tests."""

from typing import Any

import torch
from torch import Tensor, nn


def assert_relative(actual: Any, expected: Any, tolerance: float) -> float:
    """Assert max|actual − expected| / max|expected| ≤ tolerance, and return that error.

    Both are compared in float64 (complex128 if complex) on the CPU; arrays, lists and numbers are taken too.
    Shapes must be equal: nothing broadcasts. Infinities must be the same in both, NaN fails, and where
    `expected` is all zero `actual` must be.
    """
    a, b = (t if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.float64) for t in (actual, expected))
    a, b = a.detach().cpu(), b.detach().cpu()
    assert a.shape == b.shape, f"shapes differ: actual {tuple(a.shape)}, expected {tuple(b.shape)}"
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.to(wide), b.to(wide)
    if b.numel() == 0:
        return 0.0

    difference = torch.where(a == b, 0.0, (a - b).abs())  # equal infinities differ by 0, not by NaN
    difference = difference.nan_to_num(nan=torch.inf, posinf=torch.inf)  # NaN anywhere is the worst element
    scale = torch.where(b.isfinite(), b.abs(), 0.0).max().item()
    worst = int(difference.argmax())
    largest = difference.flatten()[worst].item()
    error = 0.0 if largest == 0 else largest / scale if scale > 0 else float("inf")
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), b.shape))
    assert error <= tolerance, (
        f"relative error {error:.3e} > {tolerance:.3e}; worst at {index}: "
        f"actual {a.flatten()[worst].item()!r}, expected {b.flatten()[worst].item()!r}, "
        f"max|expected| {scale:.6e}; "
        f"{int((difference > tolerance * scale).sum())} of {b.numel()} elements are over"
    )
    return error


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw standard normal values from a seed of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Root(nn.Module):
    """A finite output whose gradient is not, for an input of zeros: the square root has no slope at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x).square().sqrt())


class Spelling:
    """A tokenizer whose tokens are characters, numbered by their code points."""

    def __init__(self, bos: int | None) -> None:
        self.bos_token_id = bos

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}
