"""The projection from tiles of the gradients equals the one from their factors, and never holds more than a tile."""

import pytest
import torch

import l3d_kernels as lk
from l3d_kernels import splitting
from l3d_kernels.cpu import projection

from helpers import assert_relative


@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
@pytest.mark.parametrize("share", [1, 3])
def test_tiled_equals_factored(chunk, share, monkeypatch):
    """Values and gradients of both factors agree in float64, however small the tiles."""
    monkeypatch.setattr(splitting, "CHUNK", chunk)
    x, dy = torch.randn(4, 5, 7, dtype=torch.float64), torch.randn(4 * share, 5, 6, dtype=torch.float64)
    left = torch.randn(8, 2, 6, dtype=torch.float64, requires_grad=True)
    right = torch.randn(8, 2, 7, dtype=torch.float64, requires_grad=True)
    results = []
    for op in (lk.project, lk.project_tiled):
        value = op(x, dy, left, right)
        results.append((value, *torch.autograd.grad(value.sin().sum(), (left, right))))
    for factored, tiled in zip(*results, strict=True):
        assert_relative(tiled, factored, 1e-12)


def test_indices_are_refused():
    """Tiles of one-hot products are never worth forming: the op says so."""
    with pytest.raises(ValueError, match="x: expected a floating dtype"):
        lk.project_tiled(
            torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, 3), torch.zeros(4, 1, 3), torch.zeros(4, 1, 5)
        )


def test_no_tensor_of_the_whole_gradient_exists(monkeypatch):
    """With a small budget no intermediate is as large as [S, O, I] or [K, O, I]."""
    monkeypatch.setattr(splitting, "CHUNK", 16 * 64 * 2)
    seen = []
    outer, directions = projection.outer, projection.directions
    monkeypatch.setattr(projection, "outer", lambda *a: seen.append(outer(*a)) or seen[-1])
    monkeypatch.setattr(projection, "directions", lambda *a: seen.append(directions(*a)) or seen[-1])
    left, right = torch.randn(12, 2, 48, requires_grad=True), torch.randn(12, 2, 64, requires_grad=True)
    lk.project_tiled(torch.randn(16, 3, 64), torch.randn(16, 3, 48), left, right).sum().backward()
    assert seen
    assert max(tensor.numel() for tensor in seen) <= 16 * 64 * 2
