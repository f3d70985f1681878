"""A training step by each method, side by side: time in one process, peak memory in a process each.

    python -m bench.steps [CASE ..] [--readme docs/benchmarks/steps.md]

Losses are compared before anything is timed. Times are medians of rounds in which the methods take turns; what is
reported is their ratio. Writes bench/results/steps.json and, with --readme, the table between the marks of that page.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.measure.environment import RESULTS, environment
from bench.methods.cases import CASES, METHODS, Case
from l3d.storage.files import replace_between, replace_text
from l3d.toys import one_thread
from l3d.training.memory import peak_memory

MARKS = ("<!-- steps -->", "<!-- /steps -->")
SECONDS = 20.0  # of rounds per case, and at least so many rounds:
ROUNDS = 3
AGREEMENT = 1e-3  # of the losses, relative: float32


def measure(name: str) -> list[dict[str, Any]]:
    """Return a row per method for one case, or raise if the methods do not compute the same."""
    case = CASES[name]()
    losses = {method: float(case.loss(method).detach()) for method in METHODS}
    for method, loss in losses.items():
        if abs(loss - losses["l3d"]) > AGREEMENT * losses["l3d"]:
            raise SystemExit(f"{name}: {method} gives the loss {loss}, l3d {losses['l3d']}: nothing is timed")
    times = take_turns(case)
    memory = {method: peak_of(name, method) for method in METHODS}
    return [
        {
            "case": name,
            "method": method,
            "seconds": statistics.median(times[method]),
            "fastest": min(times[method]),
            "slowest": max(times[method]),
            "rounds": len(times[method]),
            "peak_memory_bytes": memory[method],
            "loss": losses[method],
        }
        for method in METHODS
    ]


def take_turns(case: Case) -> dict[str, list[float]]:
    """Time steps of all methods, one of each per round; of a method that spreads work over steps the mean of those."""
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for method in METHODS:
        several_steps(case, method)
    started = time.perf_counter()
    while len(times["l3d"]) < ROUNDS or time.perf_counter() - started < SECONDS:
        for method, seconds in times.items():
            seconds.append(several_steps(case, method))
    return times


def several_steps(case: Case, method: str) -> float:
    """Take as many steps as share work and return the seconds per step."""
    n = case.together(method)
    before = time.perf_counter()
    for _ in range(n):
        case.step(method)
    return (time.perf_counter() - before) / n


def peak_of(name: str, method: str) -> int:
    """Return the peak resident memory in bytes of a process that takes two steps."""
    command = [sys.executable, "-m", "bench.steps", "--peak", name, method]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def peak(name: str, method: str) -> None:
    """Take two steps and print this process's peak memory."""
    case = CASES[name]()
    for _ in range(2):
        several_steps(case, method)
    print(peak_memory())


def table(rows: list[dict[str, Any]]) -> str:
    """Write the rows as a table: times, and how often the others' time and memory ours is.

    >>> row = {"case": "tms", "seconds": 0.001, "peak_memory_bytes": 2**20}
    >>> print(table([row | {"method": "l3d"}, row | {"method": "published", "seconds": 0.003}]))
    | step | method | time | ÷ l3d | peak memory | ÷ l3d |
    |---|---|---|---|---|---|
    | tms | l3d | 1 ms | | 1 MiB | |
    | tms | published | 3 ms | 3.0 | 1 MiB | 1.0 |
    <BLANKLINE>
    """
    lines = ["| step | method | time | ÷ l3d | peak memory | ÷ l3d |", "|---|---|---|---|---|---|"]
    ours = {row["case"]: row for row in rows if row["method"] == "l3d"}
    for row in rows:
        mine = ours[row["case"]]
        slower, larger = "", ""
        if row is not mine:
            slower = f"{row['seconds'] / mine['seconds']:.1f} "
            larger = f"{row['peak_memory_bytes'] / mine['peak_memory_bytes']:.1f} "
        seconds = f"{1000 * row['seconds']:.3g} ms" if row["seconds"] < 1 else f"{row['seconds']:.3g} s"
        memory = f"{row['peak_memory_bytes'] / 2**20:.0f} MiB"
        lines.append(f"| {row['case']} | {row['method']} | {seconds} | {slower}| {memory} | {larger}|")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the cases named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help=f"of {', '.join(CASES)}; all where none is named")
    parser.add_argument("--readme", type=Path, help="put the table between the marks of this page")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return peak(*arguments.peak)
    unknown = [name for name in arguments.case if name not in CASES]
    if unknown:
        raise SystemExit(f"case: expected some of {', '.join(CASES)}, got {', '.join(unknown)}")
    if arguments.readme is not None:
        replace_between(arguments.readme, MARKS, None)
    rows: list[dict[str, Any]] = []
    for name in arguments.case or CASES:
        if name == "tms":
            with one_thread():
                rows += measure(name)
        else:
            rows += measure(name)
        print(table(rows[-len(METHODS) :]), flush=True)
    holds = {"environment": environment(), "rows": rows}
    print(f"written: {replace_text(RESULTS / 'steps.json', json.dumps(holds, indent=1) + chr(10))}")
    if arguments.readme is not None:
        print(f"written: {replace_between(arguments.readme, MARKS, table(rows))}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
