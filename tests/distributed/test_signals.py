"""Ctrl-C and SIGTERM finish the step, save it and say how to go on; others' handlers and threads are left alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import l3d
from l3d.callbacks import Callback
from l3d.distributed import signals

from training_runs import Net, assert_same_bits, points, train


@pytest.fixture(autouse=True)
def one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step run the model once, so that a signal can come within a step."""
    monkeypatch.setattr("l3d.gradients.ahead.MOST", 1)


def sending(number: int, then: Callable[[], object] = lambda: None) -> Callable[[Tensor], Tensor]:
    """Return what a model does to get a signal within a forward pass."""

    def act(y: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        then()
        return y

    return act


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("at", [2, 5, 9, 12, 20, 21])
def test_a_signal_finishes_the_step_and_saves_it(
    at: int, number: int, kind: type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is of the step in which the signal came, and the run goes on from there to the same bits."""
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(kind) as stop:
        train(Net(at, sending(number)), out=tmp_path / "run", checkpoint_every=6)  # the first call checks arguments
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    assert last.name == f"step{at - 1:09d}"
    line = f"interrupted; last checkpoint: {last}; resume with: "
    line += f"l3d.decompose(.., out='{tmp_path / 'run'}', existing='resume')"
    if kind is SystemExit:
        assert stop.value.code == 143  # type: ignore[attr-defined]
        assert capsys.readouterr().err == f"l3d: {line}\n"
    else:
        assert str(stop.value) == line
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert_same_bits(train(out=tmp_path / "run", checkpoint_every=6, existing="resume"), train())


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_without_a_folder_the_step_is_finished(number: int, kind: type[BaseException]) -> None:
    rows: list[int] = []

    class Note(Callback):
        def on_step(self, step: int, figures: Any) -> None:
            rows.append(step)

    with pytest.raises(kind):
        train(Net(6, sending(number)), callbacks=[Note()])
    assert rows[-1] == 5


def test_a_signal_while_the_last_step_is_saved_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not forgotten; resuming has nothing left to train."""
    from l3d.storage.run_folder import RunFolder

    save = RunFolder.save_checkpoint

    def interrupted(self: RunFolder, step: int, *rest: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        save(self, step, *rest)

    monkeypatch.setattr(RunFolder, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt, match="step000000020; resume with"):
        train(out=tmp_path / "run", checkpoint_every=20)
    monkeypatch.undo()
    assert_same_bits(train(out=tmp_path / "run", checkpoint_every=20, existing="resume"), train())


def test_a_later_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a step takes long, a second Ctrl-C does not wait for it; one that follows at once, as torchrun's, does."""
    again = sending(signal.SIGINT)
    act = sending(signal.SIGINT, lambda: again(torch.zeros(1)))
    with pytest.raises(KeyboardInterrupt, match="step000000007"):
        train(Net(8, act), out=tmp_path / "waits", checkpoint_every=4)
    monkeypatch.setattr(signals, "AT_ONCE", -1.0)
    with pytest.raises(KeyboardInterrupt, match="step000000004"):
        train(Net(8, act), out=tmp_path / "at once", checkpoint_every=4)


def test_an_error_that_the_signal_caused_is_an_interruption(tmp_path: Path) -> None:
    """Ctrl-C also ends a DataLoader's processes, and reading from them then fails."""

    class Loader:
        def __init__(self, signalled: bool) -> None:
            self.signalled = signalled

        def __iter__(self) -> Iterator[Tensor]:
            yield from points(56).split(8)
            if self.signalled:
                os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("DataLoader worker (pid 1) exited unexpectedly")

    with pytest.raises(KeyboardInterrupt, match="step000000004"):
        train(data=Loader(True), out=tmp_path / "run", checkpoint_every=4)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        train(data=Loader(False), out=tmp_path / "other", checkpoint_every=4)


def test_handlers_of_the_users_own_stay(tmp_path: Path) -> None:
    """A program that handles a signal itself, such as a cluster's, goes on doing so."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        assert_same_bits(train(Net(5, sending(signal.SIGTERM))), train())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_a_run_in_another_thread_has_no_handlers() -> None:
    """Python allows them in the main thread alone; the run is as ever."""
    found: list[l3d.Decomposition] = []
    thread = threading.Thread(target=lambda: found.append(train()))
    thread.start()
    thread.join()
    assert_same_bits(found[0], train())


def test_asking_costs_nothing() -> None:
    """A look at the flag takes less than 2 microseconds a step."""
    stop = signals.Stop()
    start = time.perf_counter()
    for _ in range(10_000):
        stop.asked(None)
    assert time.perf_counter() - start < 10_000 * 2e-6


USER = """
import time
import torch

class Slow(torch.nn.Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)

def model():
    torch.manual_seed(0)
    return Slow(4, 3)

def data():
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_status_of_the_command(number: int, status: int, tmp_path: Path) -> None:
    """`l3d decompose` saves, says how to go on in its last line, and exits with 130 or 143."""
    (tmp_path / "users.py").write_text(USER)
    command = [sys.executable, "-m", "l3d", "decompose", "--model", "python:users:model", "--data", "python:users:data"]
    command += ["--rank", "1", "--n_subnetworks", "4", "--steps", "100000", "--checkpoint_every", "5", "--out", "run"]
    path = os.pathsep.join([str(Path(l3d.__file__).parents[1]), str(tmp_path)])
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/checkpoints/step*[0-9]")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == status
    last = max(path.name for path in tmp_path.glob("run/checkpoints/step*[0-9]"))
    line = f"l3d: interrupted; last checkpoint: run/checkpoints/{last}; resume with: l3d resume run"
    assert errors.splitlines()[-1] == line
