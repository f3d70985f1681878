"""Check the presets: learning rates, warm start, steps, and that training is Adam on the objective."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import l3d
from l3d.api import Decomposition
from l3d.data.batches import mix
from l3d.decomposition.objective import objective
from l3d.training.settings import kept_fraction, learning_rate, resolve

from helpers import assert_relative
from training_runs import Net, points, train

pytestmark = pytest.mark.usefixtures("one_batch_at_a_time")


CHOSEN: dict[str, Any] = {
    "n_subnetworks": 5,
    "rank": 1,
    "k": 0.1,
    "params": None,
    "divergence": "mse",
    "reference": "sample",
    "positions": "all",
    "steps": None,
    "batch_size": 32,
    "lr": None,
    "warm_start": None,
    "weight_decay": 0.0,
    "shuffle": False,
    "updates": 1,
    "start": "random",
    "revive": None,
    "seed": 0,
    "dtype": None,
    "backend": "auto",
}


@pytest.mark.parametrize(
    "n_rows, batch_size, steps",
    [(1000, 32, 32_000), (64, 32, 2000), (70, 32, 3000), (65, 32, 2000), (1, 32, 1000), (3, 1, 3000), (33, 32, 1000)],
)
def test_published_preset_is_the_paper_s_recipe(n_rows: int, batch_size: int, steps: int) -> None:
    """1000 epochs, Adam at an absolute rate of 0.01 times 0.8 every tenth, everything kept at first."""
    settings = resolve("published", n_rows, **{**CHOSEN, "batch_size": batch_size})
    assert (settings.lr, settings.relative_lr, settings.schedule, settings.warm_shape) == (0.01, False, "step", "hold")
    rates = [learning_rate(settings, step) for step in range(0, settings.steps, settings.steps // 100)]
    assert rates == [0.8 ** (i // 10) for i in range(100)]
    assert learning_rate(settings, settings.steps // 10 - 1) == 1
    assert learning_rate(settings, settings.steps - 1) == 0.8**9
    assert settings.steps == steps


@pytest.mark.parametrize("steps", [10, 37, 100, 2000, 32_000])
def test_published_rate_falls_at_each_tenth_exactly(steps: int) -> None:
    """The rate has its j-th drop at the first step that is j tenths into the run, for every number of steps."""
    settings = resolve("published", None, **{**CHOSEN, "steps": steps})
    for step in range(steps):
        assert learning_rate(settings, step) == 0.8 ** (10 * step // steps)


def test_default_preset() -> None:
    """2000 steps at a relative rate of 0.1 on a cosine that ends at a hundredth; k falls geometrically over a tenth."""
    settings = resolve("default", 1000, **CHOSEN)
    assert (settings.steps, settings.lr, settings.relative_lr, settings.schedule) == (2000, 0.1, True, "cosine")
    assert (settings.warm_start, settings.warm_shape) == (200, "anneal")
    rates = [learning_rate(settings, step) for step in range(2000)]
    assert rates[0] == 1
    assert all(a > b > 0.01 for a, b in itertools.pairwise(rates))
    assert rates[-1] < 0.0101


@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize(
    "steps, warm_start, expected", [(100, None, 10), (100, 40, 40), (100, 0, 0), (100, 100, 100), (5, None, 0)]
)
def test_warm_start_schedule(preset: str, steps: int, warm_start: int | None, expected: int) -> None:
    """More than k is kept before `warm_start` and k from it on: held at 1, or falling steadily from 1."""
    settings = resolve(preset, None, **{**CHOSEN, "steps": steps, "warm_start": warm_start})
    fractions = [kept_fraction(settings, step) for step in range(steps)]
    assert settings.warm_start == expected
    assert fractions[expected:] == [0.1] * (steps - expected)
    warm = fractions[:expected]
    assert all(fraction > 0.1 for fraction in warm)
    if preset == "published":
        assert warm == [1.0] * expected
    elif warm:
        assert warm[0] == 1
        ratios = [b / a for a, b in itertools.pairwise([*warm, 0.1])]
        assert ratios == pytest.approx([0.1 ** (1 / expected)] * expected, rel=1e-12)


@pytest.mark.parametrize("preset", ["default", "published"])
def test_training_is_adam_on_the_objective(preset: str) -> None:
    """A run is, to 1e-9, a plain loop: loss of the batch, torch's Adam, unit norm, with the preset's k and rate.

    In the default preset every subnetwork has an Adam of its own, which steps when a batch keeps the subnetwork.
    """
    model, batch = Net().double(), points(8).double()
    run = train(model, [batch], preset=preset, reference="uniform", steps=30, seed=3, k=0.06)
    gradients = l3d.extract_gradients(model, batch, reference="uniform")
    d = Decomposition(gradients.shapes, 4, 2, generator=torch.Generator().manual_seed(mix(3, 1))).double()
    scales = [p.detach().square().mean().sqrt().item() if preset == "default" else 1.0 for p in d.parameters()]
    slices = [[nn.Parameter(row.clone()) for row in p.detach()] for p in d.parameters()]
    adams = [torch.optim.Adam([{"params": [rows[i]]} for rows in slices]) for i in range(4)]
    rested = 0
    for step in range(30):
        k = 0.06 if step >= 3 else 1.0 if preset == "published" else 0.06 ** (step / 3)
        rate = 0.01 * 0.8 ** (step // 3) if preset == "published" else 0.0
        if preset == "default":
            rate = 0.1 * (0.01 + 0.99 * (1 + math.cos(math.pi * step / 30)) / 2)
        result = objective(gradients, d.encoder, d.decoder, k)
        assert run.history["error"][step] == pytest.approx(result.loss.item(), rel=1e-9)
        assert run.history["lr"][step] == pytest.approx(rate, rel=1e-12)
        derivatives = torch.autograd.grad(result.loss, list(d.parameters()))
        for i, adam in enumerate(adams):
            if preset == "default" and i not in result.kept.columns:
                rested += 1
                continue
            for group, scale, rows, derivative in zip(adam.param_groups, scales, slices, derivatives, strict=True):
                group["lr"] = rate * scale
                rows[i].grad = derivative[i]
            adam.step()
        with torch.no_grad():
            for p, rows in zip(d.parameters(), slices, strict=True):
                p.copy_(torch.stack(rows))
            d.normalize_()
            for p, rows in zip(d.parameters(), slices, strict=True):
                for row, value in zip(rows, p, strict=True):
                    row.copy_(value)
    assert (rested > 0) == (preset == "default")  # or the two would be tested by the same
    for trained, expected in zip(run.parameters(), d.parameters(), strict=True):
        assert_relative(trained, expected, 1e-9)


@pytest.mark.parametrize("chosen", [None, False, True])
def test_the_presets_revive_unless_they_are_the_paper_s(chosen: bool | None) -> None:
    """With revive=None the preset default revives dead subnetworks and published does not; a choice holds in both."""
    for preset, default in (("default", True), ("published", False)):
        settings = resolve(preset, None, **{**CHOSEN, "revive": chosen})
        assert settings.revive is (default if chosen is None else chosen)


@pytest.mark.parametrize("k", [0.05, 0.3, 0.5, 1.0])
def test_k_is_kept_to_the_entry(k: float) -> None:
    """After the warm start each batch keeps floor(k·S·K + ½) coefficients, at least one."""
    d = train(k=k, warm_start=5)
    assert d.history["kept_per_sample"][5:] == [max(1, math.floor(k * 32 + 0.5)) / 8] * 15
    assert d.history["k"][5:] == [k] * 15
    assert min(d.history["kept_per_sample"]) == d.history["kept_per_sample"][-1]
