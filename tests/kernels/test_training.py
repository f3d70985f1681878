"""A few training steps with every operation a kernel end where those with the twins end."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d import flat

from tools import launches


class Images(nn.Module):
    """A grouped and a depthwise convolution before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.depthwise = nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.depthwise(torch.relu(self.grouped(x)))).mean((2, 3)))


def vectors() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), torch.randn(32, 6), {}


def images() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    return Images(), torch.randn(16, 4, 7, 7), {}


def tokens() -> tuple[nn.Module, Tensor, dict[str, Any]]:
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7)), torch.randint(11, (16, 5)), {"divergence": "kl"}


@pytest.mark.parametrize("problem", [vectors, images, tokens])
def test_training_with_kernels_ends_where_the_twins_end(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss after four steps, and the directions, agree to float32's accuracy; kernels projected and selected."""
    monkeypatch.setattr(flat, "SMALL", 0)  # small problems would not be computed by the twins
    torch.manual_seed(0)
    model, data, settings = problem()
    settings |= {"rank": 2, "k": 0.3, "steps": 4, "batch_size": 8, "seed": 0, "progress": False}
    twin = l3d.decompose(model, data, 4, backend="torch", **settings)
    with launches("topk_write") as seen:
        own = l3d.decompose(model, data, 4, backend="triton", **settings)
    assert {"project_pair", "project_seen", "project_at_values", "project_dense_sum"} & set(seen)
    torch.testing.assert_close(own.history["error"], twin.history["error"], rtol=1e-5, atol=0)
    for name, direction in own.subnetwork(0).items():
        torch.testing.assert_close(direction, twin.subnetwork(0)[name], rtol=1e-3, atol=1e-4)
