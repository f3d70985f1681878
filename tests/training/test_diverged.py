"""A run that diverged ends with a warning and a figure; what is not known yet is not shown."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import l3d
from l3d.cli.main import main
from l3d.decomposition.subnetworks import mean_of_last
from l3d.report.report import write_report
from l3d.train import turn as train_turn
from l3d.training import history

from training_runs import Net, points, stopping, train

TOO_FAST: dict[str, dict[str, Any]] = {
    "default preset": {"lr": 1000.0, "steps": 60},
    "published preset": {"lr": 300.0, "steps": 60, "preset": "published"},
    "restarts that all diverge": {"lr": 1000.0, "steps": 60, "n_restarts": 2},
    "materialised by torch": {"lr": 1000.0, "steps": 60, "dtype": "float64", "memory": l3d.Memory(micro_batch_size=4)},
}


@pytest.mark.parametrize("kind", TOO_FAST)
def test_a_run_that_diverged_says_so(kind: str) -> None:
    """One warning at the caller's line, with the figure and what to do; the decomposition knows it too."""
    with pytest.warns(UserWarning, match=r"the run diverged: its error ended at .*; lower lr") as caught:
        d = train(**TOO_FAST[kind])
    assert len([each for each in caught if "diverged" in str(each.message)]) == 1
    errors = d.history["error"]
    assert d.diverged
    assert d.final_error == sum(errors[-6:]) / 6 > 2 * max(1.0, errors[0])


@pytest.mark.parametrize("arguments", [{}, {"preset": "published"}, {"n_restarts": 2}, {"steps": 1}, {"lr": 0.3}])
def test_a_run_that_did_not_is_silent(arguments: dict[str, Any]) -> None:
    """Also a run of one step, which has not learned anything yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not train(**arguments).diverged


LONG: dict[str, dict[str, Any]] = {  # 60 steps, in rows of 15 each
    "default preset": {"lr": 1000.0},
    "published preset": {"lr": 300.0, "preset": "published"},
    "restarts": {"lr": 1000.0, "n_restarts": 2},
    "resumed": {"lr": 1000.0, "checkpoint_every": 10},
    "general path": {"lr": 1000.0, "memory": l3d.Memory(micro_batch_size=4)},
}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_run_is_compared_with_its_first_step(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its history averages over several steps, of which the first may have diverged before the row is complete."""
    monkeypatch.setattr(history, "RECORDS", 4)
    arguments = {"steps": 60, "out": tmp_path / "run", **LONG[kind]}
    if kind == "resumed":
        with monkeypatch.context() as patch:
            patch.setattr("l3d.train.turn", stopping(train_turn, 35))
            with pytest.raises(KeyboardInterrupt):
                train(**arguments)
        arguments["existing"] = "resume"
    with pytest.warns(UserWarning, match=r"the run diverged"):
        d = train(**arguments)
    assert len(d.history["error"]) == 4
    assert d.history["error"][0] > 1e3 > d.first_error
    own = {name: value for name, value in LONG[kind].items() if name in ("preset", "lr")}
    alone = train(**own, steps=1, warm_start=1)  # of one step, in which all is kept too
    assert kind == "restarts" or d.first_error == pytest.approx(alone.history["error"][0], rel=1e-5)
    loaded = l3d.load(tmp_path / "run")
    assert (loaded.diverged, loaded.first_error) == (True, d.first_error)


def test_what_diverged_means() -> None:
    """Twice the first step's error and that of none, which is 1; without it, that of the first row."""
    d = l3d.Decomposition({"w": torch.Size([2])}, 1, 1)
    nan = float("nan")
    for first, errors, expected in (
        (0.9, [1e9, 2.1], True),  # by the mean of the last tenth: the last row
        (0.9, [0.9, 1.9], False),
        (80.0, [80.0, 150.0], False),  # more directions than entries: an error above 1 at the start
        (80.0, [80.0, 161.0], True),
        (nan, [0.5, 2.1], True),
        (nan, [3.0, 2.1], False),
        (nan, [], False),
    ):
        d.first_error, d.history = first, {"error": errors}
        assert d.diverged is expected


def test_of_restarts_the_best_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only some diverged, the one that is kept did not."""
    original = history.Recorder.add

    def some_diverge(self: Any, step: int, errors: list[float], *given: Any) -> bool:
        return original(self, step, [errors[0] + 1e6 * (step > 1), *errors[1:]], *given)

    monkeypatch.setattr(history.Recorder, "add", some_diverge)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        d = train(n_restarts=3)
    assert d.restart_errors[0] > 1e5
    assert not d.diverged
    with pytest.warns(UserWarning, match=r"diverged: its error ended at 1e\+06"):
        assert train().diverged


def test_a_run_that_is_not_finite_is_an_error() -> None:
    """Which says what to do; there is no decomposition to warn of."""
    with pytest.raises(ValueError, match="lower lr"):
        train(lr=1e30)


@pytest.mark.parametrize("lr, diverged", [("1000", True), ("0.1", False)])
def test_the_command_writes_whether_it_diverged(lr: str, diverged: bool, tmp_path: Path) -> None:
    """In metrics.json, and in the report where it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        arguments = ["toy", "tms", "--steps", "60", "--lr", lr, "--describe", "0", "--out", str(tmp_path / "run")]
        assert main(arguments) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["diverged"] is diverged
    assert ("training ended at twice" in (tmp_path / "run" / "report.html").read_text()) is diverged
    (tmp_path / "run" / "metrics.json").unlink()
    assert ("training ended at twice" in write_report(tmp_path / "run").read_text()) is diverged


@pytest.mark.parametrize("n", [1, 9, 10, 25])
def test_the_runs_error_is_that_of_its_last_tenth(n: int) -> None:
    """Not of its last batch: in final_error, repr, the card's figure and what callbacks are told at the end."""
    errors = [float(i * i % 7) for i in range(n)]
    expected = sum(errors[n - max(1, n // 10) :]) / max(1, n // 10)
    assert mean_of_last(errors) == pytest.approx(expected)
    d = train()
    d.history = {name: [float(i) for i in range(n)] for name in d.history} | {"error": errors}
    assert f"error {expected:.3f} after" in repr(d)
    assert d.figures()["error"] == pytest.approx(expected)


@pytest.mark.parametrize("steps, known", [(20, False), (199, False), (200, True), (230, True)])
def test_dead_subnetworks_are_not_told_before_they_can_be_known(steps: int, known: bool) -> None:
    """A subnetwork counts as dead after 200 steps: before, no figure of them is told."""

    class Rows(l3d.callbacks.Callback):
        def __init__(self) -> None:
            self.told: list[bool] = []

        def on_step(self, step: int, figures: Any) -> None:
            self.told.append("dead_fraction" in figures)

        def on_end(self, figures: Any) -> None:
            self.told.append("dead_fraction" in figures)

    rows = Rows()
    d = l3d.decompose(Net(), points(), 4, rank=1, steps=steps, batch_size=8, callbacks=[rows])
    assert rows.told[-1] is known
    assert rows.told[:-1] == [step >= 200 for step in range(1, steps + 1)]
    assert ("dead_fraction" in d.figures()) is known
    bar = l3d.callbacks.ProgressBar()
    bar.on_start({"steps": 3})
    for figures in ({"dead_fraction": 0.0}, {}):
        bar.on_step(1, {"error": 1.0, "kept_per_sample": 1.0, "samples_per_second": 1.0, **figures})
        assert ("dead" in bar._bar.tasks[0].fields["figures"]) is bool(figures)
    bar.close()
