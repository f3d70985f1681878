"""Kill runs until they have been killed often enough: `python kill_worker.py FOLDER PROCESSES KILLS SEED`.

Every run is trained by forked children, in one process or several. Half of the kills come at a random moment, half at
one of the first process's operations on files, before, after or half way. A killed run is resumed, and killed again; a
run that ends must have the bits of one that was never killed. Prints the counts as JSON.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import l3d
from l3d.distributed.watch import together

from training_runs import assert_same_bits, train

RUN: dict[str, Any] = {"steps": 40, "checkpoint_every": 3}
OPERATIONS = {os: ("replace", "rename", "unlink", "rmdir", "fsync"), Path: ("mkdir", "write_bytes", "write_text")}
FAILED = 97  # the exit status of a child that raised an error


def count_operations(at: int, when: str) -> list[int]:
    """Kill this process "before", "half way" or "after" its at-th operation on files (0: never); return the count."""
    calls = [0]

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] != at:
                return original(*given, **options)
            if when == "half way" and name.startswith("write_"):
                content = given[1] if isinstance(given[1], bytes) else given[1].encode()
                with open(given[0], "wb") as file:
                    file.write(content[: len(content) // 2])
            elif when == "after":
                original(*given, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    for of, names in OPERATIONS.items():
        for name in names:
            setattr(of, name, wrapped(name, getattr(of, name)))
    return calls


def start(run: Path, n: int, at: int = 0, when: str = "before") -> list[int]:
    """Start training in n children, which go on with what is in the folder; return their process ids."""
    existing = "resume" if (run / "checkpoints").is_dir() else "refuse"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(n):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            log = os.open(run.with_suffix(f".{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            calls = count_operations(at if rank == 0 else 0, when)
            with together(lambda command: f"go on with {command}"):
                train(out=run, existing=existing, **RUN)
            run.with_suffix(f".{rank}.count").write_text(str(calls[0]))
            os._exit(0)
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(FAILED)
    return children


def wait(children: list[int], run: Path) -> list[int]:
    """Wait for all children, a minute at most; return their statuses: minus the signal, or the exit status.

    As torchrun does, send the others SIGTERM when one has been killed, though 5 s later: most end before.
    """
    statuses: dict[int, int] = {}
    deadline, killed = time.monotonic() + 60, 0.0
    while len(statuses) < len(children):
        running = [child for child in children if child not in statuses]
        for child in running:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
                killed = killed or time.monotonic()
            elif killed and time.monotonic() > killed + 5 and -signal.SIGKILL in statuses.values():
                os.kill(child, signal.SIGTERM)
                killed = time.monotonic()
        if time.monotonic() > deadline:
            for child in running:
                os.kill(child, signal.SIGKILL)
            raise AssertionError(f"a process hangs: {logs(run)}")
        time.sleep(0.002)
    return [statuses[child] for child in children]


def logs(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run.parent.glob(f"{run.name}.*.log")))


def main(folder: Path, n: int, kills: int, seed: int) -> dict[str, int]:
    """Kill `kills` times and return the counts."""
    draw, whole, run = random.Random(seed), folder / "whole", folder / "run"
    began = time.monotonic()
    assert wait(start(whole, n), whole) == [0] * n, logs(whole)
    seconds = time.monotonic() - began
    n_operations = int(whole.with_suffix(".0.count").read_text())
    expected = l3d.load(whole)
    counts = {"kills": 0, "at file operations": 0, "before a checkpoint": 0, "runs compared": 0}
    while True:
        more = counts["kills"] < kills
        at = draw.randint(1, n_operations) if more and draw.random() < 0.5 else 0
        children = start(run, n, at, draw.choice(["before", "half way", "after"]))
        if more and not at:
            time.sleep(draw.uniform(0, seconds))
            for child in draw.sample(children, draw.randint(1, n)):
                os.kill(child, signal.SIGKILL)  # it is not waited for yet, so its number is still its own
        statuses = wait(children, run)
        # a process that has not joined the others yet ends by SIGTERM, one that has with status 3
        ends = {0, -signal.SIGKILL, -signal.SIGTERM, 143, 3} if more else {0}
        assert set(statuses) <= ends, f"{statuses}: {logs(run)}"
        if -signal.SIGKILL in statuses:
            counts["kills"] += 1
            counts["at file operations"] += at > 0
            counts["before a checkpoint"] += not list(run.glob("checkpoints/step*[0-9]"))
        if set(statuses) == {0}:
            assert_same_bits(l3d.load(run), expected)
            assert len(list((run / "checkpoints").iterdir())) == 2
            counts["runs compared"] += 1
            shutil.rmtree(run)
            if not more:
                return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
