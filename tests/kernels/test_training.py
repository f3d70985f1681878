"""A few training steps with every operation a kernel end where those with the twins end."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d.api import Decomposition
from l3d.decomposition import flat
from l3d.decomposition.costs import Path, Plan
from l3d.decomposition.objective import objective
from l3d_kernels.kernels.topk import radix

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
    with launches("topk_write", "adam_gram", "adam_slices", "rescale_slices") as seen:
        own = l3d.decompose(model, data, 4, backend="triton", **settings)
    assert {"project_pair", "project_seen", "project_at_values", "project_dense_sum"} & set(seen)
    torch.testing.assert_close(own.history["error"], twin.history["error"], rtol=1e-5, atol=0)
    for name, direction in own.subnetwork(0).items():
        torch.testing.assert_close(direction, twin.subnetwork(0)[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_the_selection_begins_while_coefficients_are_made(n_layers: int) -> None:
    """With sampled paths the last tensor's epilogue counts the first digit, and top-k makes one pass less."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(n_layers)))
    gradients = l3d.extract_gradients(model, torch.randn(8, 5, 16))
    d = Decomposition(gradients.shapes, 4, 2, {"k": 0.25}, torch.Generator().manual_seed(1))
    paths = dict.fromkeys(gradients.shapes, Path(materialised=False, sampled=True))
    results = {}
    for backend in ("torch", "triton"):
        with launches(*(("project_pair", "topk_histogram") if backend == "triton" else ())) as seen:
            loss = objective(gradients, d.encoder, d.decoder, 0.25, Plan(paths=paths, backend=backend)).loss
        results[backend] = [loss.detach(), *torch.autograd.grad(loss, list(d.parameters()))]
    assert seen["topk_histogram"] == len(radix.DIGITS[4]) - 1, "the first digit was counted in a pass of its own"
    assert seen["project_pair"] == n_layers
    for own, twin in zip(results["triton"], results["torch"], strict=True):
        torch.testing.assert_close(own, twin, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_a_convolution_takes_as_many_launches_whatever_its_groups(groups: int) -> None:
    """Plain, grouped and depthwise: one projection for encoder and decoder together, none of them per group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups, bias=False))
    gradients = l3d.extract_gradients(model, torch.randn(4, 8, 5, 5))
    assert len(gradients.parts["0.weight"]) == 1
    d = Decomposition(gradients.shapes, 3, 1, {"k": 0.5}, torch.Generator().manual_seed(1))
    with launches() as seen:
        objective(gradients, d.encoder, d.decoder, 0.5, Plan(backend="triton"))
    assert sum(count for name, count in seen.items() if name.startswith("project")) == 1, seen
