"""Check what a run tells its callbacks, and what TensorBoard and Weights & Biases receive."""

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import l3d
from l3d import callbacks
from l3d.cli.main import main


class Notes(callbacks.Callback):
    """Write down what was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def on_folder(self, folder: Path) -> None:
        self.told.append(("folder", folder))

    def on_note(self, line: str) -> None:
        self.told.append(("note", line))

    def on_start(self, settings: Mapping[str, Any]) -> None:
        self.told.append(("start", dict(settings)))

    def on_step(self, step: int, figures: Mapping[str, float]) -> None:
        self.told.append(("step", (step, dict(figures))))

    def on_end(self, figures: Mapping[str, float]) -> None:
        self.told.append(("end", dict(figures)))


def train(steps: int = 5, **arguments: Any) -> l3d.Decomposition:
    torch.manual_seed(0)
    return l3d.decompose(nn.Linear(4, 3), torch.randn(32, 4), 2, rank=1, steps=steps, **arguments)


def test_a_callback_is_told_the_settings_every_record_and_the_end() -> None:
    """In this order; the figures are the history's, but for the dead, who are not known in so few steps."""
    notes = Notes()
    d = train(callbacks=[notes])
    assert [kind for kind, _ in notes.told] == ["start", "note", *["step"] * 5, "end"]
    assert notes.told[0][1] == d.settings
    assert notes.told[1][1] == "divergence: mse, as the model's outputs have no .logits [B, T, V]"
    for i, (_, (step, figures)) in enumerate(notes.told[2:-1]):
        assert step == i + 1
        known = {name: values for name, values in d.history.items() if name != "dead_fraction"}  # not in few steps
        assert figures == {name: values[i] for name, values in known.items()}
    assert notes.told[-1][1] == notes.told[-2][1][1]


def test_a_callback_is_told_the_folder_first_and_the_choice_of_the_cache_last(tmp_path: Path) -> None:
    """The folder is open and empty but for its lock; the line says whether gradients are read or extracted."""
    notes = Notes()
    cache = l3d.GradientCache(tmp_path / "cache", reads="on")
    train(callbacks=[notes], out=tmp_path / "run", cache=cache)
    assert [kind for kind, _ in notes.told] == ["folder", "start", "note", *["step"] * 5, "note", "end"]
    assert notes.told[0][1] == tmp_path / "run"
    assert notes.told[-2][1].startswith("cache: ")


def test_following_a_run_changes_nothing() -> None:
    alone, followed = train(), train(callbacks=[Notes()])
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), followed.parameters(), strict=True))


def test_the_end_of_a_run_that_failed_is_not_told() -> None:
    class Failing(Notes):
        def on_step(self, step: int, figures: Mapping[str, float]) -> None:
            raise RuntimeError("enough")

    notes = Notes()
    with pytest.raises(RuntimeError, match="enough"):
        train(callbacks=[notes, Failing()])
    assert [kind for kind, _ in notes.told] == ["start", "note", "step"]


def test_the_progress_bar_shows_figures_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it writes nothing."""
    for terminal in (True, False):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=terminal, width=160)
        monkeypatch.setattr(callbacks, "Console", lambda console=console, **_: console)
        train()
        assert ("5/5" in screen.getvalue() and "error" in screen.getvalue()) == terminal
        assert terminal or not screen.getvalue()


def test_tensorboard_has_every_figure_of_the_history(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with callbacks.TensorBoard(tmp_path / "board") as board:
        d = train(callbacks=[board])
        board.on_end({"held_out_error": 0.25, "activation_rate": [0.1], "environment": "here"})
    written = EventAccumulator(str(tmp_path / "board")).Reload()
    errors = written.Scalars("train/error")
    assert [event.step for event in errors] == [1, 2, 3, 4, 5]
    assert [event.value for event in errors] == pytest.approx(d.history["error"], rel=1e-6)
    tags = set(written.Tags()["scalars"])
    names = set(d.history) - {"step", "dead_fraction"}
    assert tags == {f"{group}/{name}" for group in ("train", "end") for name in names} | {"end/held_out_error"}
    text = written.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "n_subnetworks: 2" in text


def test_wandb_keeps_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record that a later `wandb sync` would send holds settings, every step's error, and the summary."""
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with callbacks.WandB(project="test", dir=str(tmp_path), settings=wandb.Settings(x_disable_stats=True)) as log:
        d = train(callbacks=[log])
        log.on_end({"held_out_error": 0.25})
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    record, deadline = b"", time.monotonic() + 60
    while b"held_out_error" not in record and time.monotonic() < deadline:  # by a process of its own
        time.sleep(0.05)
        record = path.read_bytes()  # protobuf, with every value as JSON text
    assert all(json.dumps(error).encode() in record for error in d.history["error"])
    assert all(text in record for text in (b"held_out_error", b"0.25", b"n_subnetworks", b"samples_per_second"))


@pytest.mark.parametrize("kind, library", [("TensorBoard", "tensorboard"), ("WandB", "wandb")])
def test_a_missing_library_is_named_before_anything_runs(
    kind: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (library, "torch.utils.tensorboard"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    run = tmp_path / "run"
    assert main(["toy", "tms", "--steps", "2", "--log", kind.lower(), "--out", str(run)]) == 2
    assert "pip install 'l3d[log]'" in capsys.readouterr().err
    assert not run.exists()


def test_the_command_line_logs_to_the_run_folder(tmp_path: Path) -> None:
    """--log tensorboard leaves the curve there, with the evaluation's figures."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    arguments = ["toy", "tms", "--steps", "20", "--evaluate_rows", "50", "--describe", "0", "--log", "tensorboard"]
    assert main([*arguments, "--out", str(run)]) == 0
    written = EventAccumulator(str(run / "tensorboard")).Reload()
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(written.Scalars("train/error")) == 20
    assert written.Scalars("end/mmcs")[-1].value == pytest.approx(metrics["mmcs"], rel=1e-6)
    assert not (run / "subnetworks.json").exists()
    assert main([*arguments, "--out", str(run), "--overwrite"]) == 0
    assert len(list((run / "tensorboard").iterdir())) == 1  # the curve of this run only


def test_the_end_of_a_resumed_finished_run_is_told_at_its_last_step(tmp_path: Path) -> None:
    """No step is taken then, so none was told."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(out=tmp_path / "run")
    with callbacks.TensorBoard(tmp_path / "log") as board:
        train(out=tmp_path / "run", existing="resume", callbacks=[board])
    events = accumulator.EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert [event.step for event in events.Scalars("end/error")] == [5]
