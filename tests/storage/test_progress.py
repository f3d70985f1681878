"""Call a killed run unfinished, with its last step and what goes on with it; never "no such file"."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import l3d
from l3d.cli.main import main
from l3d.report.report import write_report
from l3d.storage.progress import unfinished

from command_line import refusal
from training_runs import train


class Stop(l3d.callbacks.Callback):
    """Interrupt at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step(self, step: int, figures: Any) -> None:
        if step >= self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a command that was killed after its checkpoint at step 40 of 60."""
    run = tmp_path_factory.mktemp("killed") / "run"
    assert main(["toy", "tms", "--steps", "60", "--checkpoint_every", "20", "--describe", "0", "--out", str(run)]) == 0
    shutil.rmtree(run / "checkpoints" / "step000000060")
    for name in ("decomposition.safetensors", "decomposition.json", "manifest.json", "metrics.json", "report.html"):
        (run / name).unlink()
    return run


PYTHON: dict[str, Callable[[Path], object]] = {"load": l3d.load, "write_report": write_report}
COMMANDS = ["report", "evaluate", "intervene"]


@pytest.mark.parametrize("what", [*PYTHON, *COMMANDS])
def test_a_killed_run_is_called_unfinished(what: str, killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By every function and command that needs its decomposition; the command that is named goes on with it."""
    last = killed / "checkpoints" / "step000000040"
    line = f"{killed} is unfinished: its last checkpoint is at step 40 of 60; go on with l3d resume {killed} "
    line += f"(or load {last})"
    if what in PYTHON:
        with pytest.raises(FileNotFoundError) as error:
            PYTHON[what](killed)
        assert str(error.value) == line
    else:
        assert refusal(capsys, [what, str(killed)]) == line
    assert l3d.load(last).history["step"][-1] == 40


def test_the_named_command_finishes_it(killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "run")
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert unfinished(tmp_path / "run") is None
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("left", ["a part of a checkpoint", "nothing"])
def test_a_run_killed_before_its_first_checkpoint(left: str, killed: Path, tmp_path: Path) -> None:
    """It has nothing to go on from, and the command that is named starts it again in the same folder."""
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    shutil.rmtree(run / "checkpoints")
    again = ["toy", "--config", str(run / "config.yaml"), "--out", str(run), "--overwrite"]
    if left != "nothing":
        (run / "checkpoints" / "step000000020.partial").mkdir(parents=True)
        again = ["resume", str(run)]
    with pytest.raises(FileNotFoundError) as error:
        l3d.load(run)
    said = f"{run} is unfinished: it ended before its first checkpoint; start it again with l3d {' '.join(again)}"
    assert str(error.value) == said
    assert main(again) == 0
    assert json.loads((run / "metrics.json").read_text())["error"] < 1


def test_a_run_from_python_names_the_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a configuration no command can go on with it."""
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=r"resume with: l3d.decompose\(.., out='.*run', existing='resume'\)"):
        train(out=run, checkpoint_every=4, callbacks=[Stop(10)])
    line = f"{run} is unfinished: its last checkpoint is at step 8 of 20; go on with "
    line += f"l3d.decompose(.., out='{run}', existing='resume') (or load {run / 'checkpoints' / 'step000000008'})"
    assert refusal(capsys, ["report", str(run)]) == line
    with pytest.raises(FileNotFoundError, match="is unfinished"):
        l3d.load(run)


def test_what_a_process_killed_at_once_has_left_is_no_obstacle(tmp_path: Path) -> None:
    """A lock and temporary files are not the user's: a run may start there, and deletes them; other files stay."""
    for name in (".lock", ".lock.123.partial", ".config.yaml.9.partial"):
        (tmp_path / name).write_text("{")
    train(out=tmp_path)
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".mine.partial").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        train(out=tmp_path / "other")


def test_a_folder_of_something_else_is_not_called_unfinished(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert unfinished(path) is None
    (tmp_path / "config.yaml").write_text("mine: 1")
    with pytest.raises(FileNotFoundError, match="no such file; expected a folder that l3d wrote"):
        l3d.load(tmp_path)
