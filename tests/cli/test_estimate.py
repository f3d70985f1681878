"""Estimate a run without training it: counts equal the run's, times come from a clock, nothing is written."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import l3d
from l3d.cli.main import main
from l3d.estimate import N_STEPS, Estimate, estimate, path_name
from l3d.training.run import Run
from l3d.training.step import StepResult

from small_models import mlp

ARGUMENTS: dict[str, Any] = {"n_subnetworks": 5, "rank": 2, "k": 0.2, "batch_size": 8, "steps": 1000}


def test_what_is_counted() -> None:
    """Parameters, factors and kept coefficients by hand; micro-batches add up to the batch."""
    factors = 4 * (8 * (4 + 6) + 8 * 6 + 8 * (6 + 3) + 8 * 3)  # x and dy of two layers; dy is the bias's gradient
    numbers = 2 * 5 * (2 * (6 + 4) + 6 + 2 * (3 + 6) + 3)
    for changes in ({}, {"memory": l3d.Memory(micro_batch_size=3)}):
        found = estimate(mlp(), torch.randn(40, 4), **ARGUMENTS, **changes)
        assert [each.name for each in found.tensors] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert [each.ranks for each in found.tensors] == [(2,), (), (2,), ()]
        assert sum(each.parameters for each in found.tensors) == numbers
        assert sum(each.factor_bytes for each in found.tensors) in (factors, factors + 1)  # chunks of 3, 3 and 2 rows
        assert found.factor_bytes <= factors
        assert (found.n_samples, found.n_kept) == (8, 8)
        assert (found.parameter_bytes, found.optimizer_bytes) == (4 * numbers, 20 * numbers)
        assert found.peak_bytes > found.factor_bytes + found.parameter_bytes + found.optimizer_bytes
        assert path_name(found.tensors[1]) == "whole"


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that steps move: one second at the final k, two while all is kept; a tenth of the run is between."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    original, steps = Run.take_step, []

    def take_step(run: Run, gradients: Any) -> StepResult | None:
        steps.append(run.step)
        now[0] += 2.0 if run.step < run.settings.warm_start else 1.0
        return original(run, gradients)

    monkeypatch.setattr(Run, "take_step", take_step)
    found = estimate(mlp(), torch.randn(40, 4), **ARGUMENTS)
    assert (found.seconds_per_step, found.seconds_per_warm_step) == (1.0, 2.0)
    assert found.seconds == 100 * 1.5 + 900
    assert steps == [0] * (N_STEPS + 1) + [100] * N_STEPS


@pytest.mark.parametrize("spelled", ["--dry_run", "--dry-run"])
def test_the_command_writes_nothing(
    spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Either spelling prints what the run would take and leaves no file, the run folder's and the cache's included."""
    program = (
        "import torch\ndef model():\n    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.PReLU())\n"
        "def data():\n    return torch.randn(40, 4)\n"
    )
    name = f"user{len(spelled)}{spelled.count('_')}"
    (tmp_path / f"{name}.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    sources = ["--model", f"python:{name}:model", "--data", f"python:{name}:data", "--rank", "1"]
    assert (
        main(["decompose", *sources, "--n_subnetworks", "4", "--out", "run", "--cache.folder", "cache", spelled]) == 0
    )
    printed = capsys.readouterr().out
    for words in (
        "weight",
        "3×4",
        "peak memory, predicted",
        "a step while all is kept",
        "the whole run",
        "for 1.weight at Prelu",
    ):
        assert words in printed
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.py"]


def test_an_estimate_is_shown_in_one_line() -> None:
    """Sizes, memory and times, not every tensor."""
    found = Estimate([], 8, 16, 1, 5, 2, 2**30, 3 * 2**20, 0.5, 0.75, 90.0)
    assert repr(found) == (
        "Estimate(0 tensors; n_samples=8, n_kept=16; peak 1 GiB, measured 3 MiB; 0.5 s a step, 1 min 30 s in all)"
    )
