"""Train in several processes as in one: same kept sets and losses, checkpoints for any number, a clean end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import l3d

import process_worker
from helpers import assert_relative

WORKER = Path(process_worker.__file__)
NAMES = [name for name in process_worker.RUNS if name != "interrupted"]


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    """What a worker's run sets in its own process is put back in this one."""
    yield
    torch.set_default_dtype(torch.float32)


def start(n: int, command: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Start n processes as torchrun would, but without its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = WORKER.parents[2]
    processes = []
    for rank in range(n):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": f"{root}:{WORKER.parent}:{folder}"}
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | own,
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_what_one_does(n: int, tmp_path: Path) -> None:
    """Over 24 steps every step keeps the same entries; losses, directions and thresholds agree; so do resumed runs."""
    names = NAMES if n == 2 else NAMES[:1]
    with process_worker.interrupted_at(10):
        process_worker.run("interrupted", tmp_path, out=tmp_path / "begun by one")
    processes = start(n, [str(WORKER), str(tmp_path), *names], tmp_path)
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * n, outputs
    for name in names:
        history, tensors, kept, threshold = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        folder = tmp_path / "alone"
        d, expected = process_worker.run(
            name, folder, **({"memory": l3d.Memory(micro_batch_size=20)} if name == "cached" else {})
        )
        assert kept == expected, name
        assert_relative(history["error"], d.history["error"], 1e-9)
        assert history["kept_per_sample"] == d.history["kept_per_sample"]
        assert history["dead_fraction"] == d.history["dead_fraction"]
        assert_relative(threshold, d.threshold, 1e-9)
        assert_same_decomposition(tensors, d)
        assert_same_decomposition(l3d.load(tmp_path / f"run {name}").state_dict(), d)
        assert not list((tmp_path / f"run {name}").rglob("*.partial"))
        if name == "language":
            assert max(history["dead_fraction"]) > 0
    whole, _ = process_worker.run("interrupted", tmp_path, out=tmp_path / "uninterrupted")
    resumed, _ = process_worker.run("interrupted", tmp_path, out=tmp_path / "begun by many", existing="resume")
    for found in (resumed, l3d.load(tmp_path / "begun by one")):
        assert found.history["step"] == list(range(1, 15))
        assert_relative(found.history["error"], whole.history["error"], 1e-9)
        assert_same_decomposition(found.state_dict(), whole)


def assert_same_decomposition(tensors: dict[str, torch.Tensor], d: l3d.Decomposition) -> None:
    for name, tensor in d.state_dict().items():
        assert_relative(tensors[name], tensor, 1e-6)


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


def test_the_command_with_two_processes(tmp_path: Path) -> None:
    """Both end well, the first alone writes and prints, and its run folder is whole."""
    (tmp_path / "users.py").write_text(USER)
    command = ["-m", "l3d", "decompose", "--model", "python:users:model", "--data", "python:users:data", "--rank", "1"]
    processes = start(2, [*command, "--n_subnetworks", "4", "--steps", "3", "--out", "run"], tmp_path)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "metrics: run/metrics.json" in outputs[0]
    assert outputs[1] == ""
    found = l3d.load(tmp_path / "run")
    assert found.n_subnetworks == 4
    assert found.base_model["name"] == "python:users:model"
    assert list(found.base_model["parameters"]) == ["weight", "bias"]


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    """When one is killed the other ends within 30 seconds, and says which checkpoint to go on from, and how."""
    (tmp_path / "users.py").write_text(USER)
    command = ["-m", "l3d", "decompose", "--model", "python:users:model", "--data", "python:users:data", "--rank", "1"]
    command += ["--n_subnetworks", "4", "--steps", "100000", "--checkpoint_every", "5", "--out", "run"]
    processes = start(2, command, tmp_path)
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("run/checkpoints/step*[0-9]")) and time.monotonic() < deadline:
            time.sleep(0.2)
            assert all(process.poll() is None for process in processes), [p.communicate()[0] for p in processes]
        processes[1].send_signal(signal.SIGKILL)
        output, _ = processes[0].communicate(timeout=30)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 3
    last = output.strip().splitlines()[-1]
    assert last.startswith("l3d: rank 0: ")
    assert "last checkpoint: run/checkpoints/step0" in last
    assert last.endswith("-m l3d resume run")


@pytest.mark.parametrize("number, status, ranks", [(signal.SIGTERM, 143, [0, 1]), (signal.SIGINT, 130, [1])])
def test_a_signal_ends_all_after_the_same_step(number: int, status: int, ranks: list[int], tmp_path: Path) -> None:
    """torchrun passes SIGTERM to all, Ctrl-C may reach one: all finish one step, the first saves it and says so."""
    (tmp_path / "users.py").write_text(USER)
    command = ["-m", "l3d", "decompose", "--model", "python:users:model", "--data", "python:users:data", "--rank", "1"]
    command += ["--n_subnetworks", "4", "--steps", "100000", "--checkpoint_every", "1000000", "--out", "run"]
    processes = start(2, command, tmp_path)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "run" / "config.yaml").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        for rank in ranks:
            processes[rank].send_signal(number)
        outputs = [process.communicate(timeout=30)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [status, status], outputs
    (last,) = (tmp_path / "run" / "checkpoints").iterdir()
    line = f"l3d: interrupted; last checkpoint: run/checkpoints/{last.name}; resume with: l3d resume run"
    assert outputs[0].strip().splitlines()[-1] == line
    assert outputs[1] == ""
    assert json.loads((last / "state.json").read_text())["step"] == int(last.name.removeprefix("step")) > 0
    assert l3d.load(last).n_subnetworks == 4
