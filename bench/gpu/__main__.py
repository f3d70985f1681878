"""`python3 -m bench.gpu`: check every kernel, time it beside its bound and beside torch, time whole steps, write JSON.

Needs torch, triton and numpy, and no installation: run it in the repository's root. Without a GPU it says so and writes
nothing. Operations whose check fails are named, and nothing is said of their speed. Takes under eight minutes: what
there was no time for is marked as such.
`--model` prints what a step should take on five GPUs, computed on paper: without a GPU, in less than a minute.
`TRITON_INTERPRET=1 python3 -m bench.gpu --dry` runs all of it on a CPU, tiny: to see that it runs, for no figures.
"""

import argparse
import itertools
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu import checks, model, report
from bench.gpu.block import BLOCKS, StepSizes
from bench.gpu.cases import DRY, LARGE, MEDIUM, OPS, SMALL, Sizes, fitting, make, moved_bytes, tensors_of
from bench.gpu.measure import (
    Ceilings,
    Timing,
    bound,
    ceilings,
    median_seconds,
    parts,
    percent,
    use,
    workspace_bytes,
)
from bench.gpu.step import time_steps
from l3d_kernels import registry

HARD_LIMIT = 470  # seconds for everything
LIMIT = 400  # of them for all but the search for accesses beyond memory
STEP_LIMIT = 110  # of them kept for the steps
COMPILE_LIMIT = 25  # for one torch.compile: a twin that cuts its work into thousands of pieces takes minutes
TIMED = ("bf16", "tf32")
LAST = ("fp32",)  # operations alone, after the others: float32 as it is by default, in three products of tf32


def parts_of(
    name: str, inputs: dict[str, Any], backend: str, forward_only: bool = False
) -> dict[str, Callable[[], Any]]:
    """Return the calls to time: the forward pass and, where there are gradients, the backward pass alone."""
    op = OPS[name]
    return parts(lambda i: op.run(i, backend), inputs, () if forward_only else op.leaves)


def time_op(name: str, sizes: Sizes, dtype: str, device: torch.device, best: Ceilings) -> list[Timing]:
    """Time an operation at one size, and its torch twin where that fits into memory.

    The backward pass of two sides repeats the forward's products and needs as many again: twice its flops.
    """
    z = fitting(name, sizes)
    inputs = make(name, z, use(dtype), device, torch.Generator(device).manual_seed(0))
    op, done = OPS[name], []
    flops = op.flops(z, inputs)
    upstream = 0  # bytes of the gradient at the output, which the backward pass reads
    for part, call in parts_of(name, inputs, "triton").items():
        output = call()
        moved = moved_bytes(op, z, inputs, output) + upstream
        upstream = sum(t.numel() * t.element_size() for t in tensors_of(output))
        work = flops if part == "forward" else 2 * flops
        least, by = bound(work, moved, op.is_matrix, dtype, best)
        seconds = median_seconds(call, device)
        reached, space = percent(least, seconds, best.launch_seconds), workspace_bytes(call, device)
        note = "" if z.S == sizes.S else f"S={z.S}"
        own = (seconds, work, moved, least, by, reached, space)
        done.append(Timing(name, z.name, dtype, part, *own, eager_seconds=None, compiled_seconds=None, note=note))
    try:
        twin = parts_of(name, inputs, "torch")
        return [t._replace(eager_seconds=median_seconds(twin[t.part], device)) for t in done]
    except torch.OutOfMemoryError:
        return [t._replace(note=f"{t.note} the twin runs out of memory".strip()) for t in done]


def time_all(
    plan: Sequence[Sizes],
    dtypes: Sequence[str],
    device: torch.device,
    best: Ceilings,
    deadline: float,
    last: Sequence[str] = (),
    failed: Collection[str] = (),
) -> list[Timing]:
    """Time every operation at every size, the dtypes of `last` at the end; where one fails, say so and go on."""
    done: list[Timing] = []
    every = itertools.chain(itertools.product(plan, dtypes, OPS), itertools.product(plan, last, OPS))
    for sizes, dtype, name in every:
        if name in failed:
            continue
        if time.monotonic() > deadline:
            print(f"no time was left for {name} at {sizes.name} in {dtype}", flush=True)
            continue
        try:
            done += time_op(name, sizes, dtype, device, best)
        except Exception as error:  # what does not run is named; the others are still timed
            print(f"FAILED {name} at {sizes.name} in {dtype}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return done


def compiled_too(timings: list[Timing], plan: Sequence[Sizes], device: torch.device, deadline: float) -> list[Timing]:
    """Add the time of torch.compile of the twin's forward pass, as long as there is time."""
    by_name = {sizes.name: sizes for sizes in plan}
    done = []
    for t in timings:
        if t.part == "backward":
            done.append(t._replace(note=f"{t.note} the twin's backward pass is not compiled".strip()))
            continue
        seconds, note = None, "no time was left for torch.compile"
        if time.monotonic() < deadline:
            sizes = fitting(t.op, by_name[t.size])
            inputs = make(t.op, sizes, use(t.dtype), device, torch.Generator(device).manual_seed(0))
            seconds, note = compiled_seconds(parts_of(t.op, inputs, "torch", forward_only=True)["forward"], device)
            torch.cuda.empty_cache()
        done.append(t._replace(compiled_seconds=seconds, note=f"{t.note} {note}".strip()))
    return done


def compiled_seconds(call: Callable[[], Any], device: torch.device) -> tuple[float | None, str]:
    """Return the time of torch.compile of a call, or None and why there is none."""

    def too_long(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, COMPILE_LIMIT, 1)  # again and again: the compiler swallows exceptions
    try:
        return median_seconds(torch.compile(call), device), ""
    except Exception as error:  # of whatever kind the compiler makes of it
        return None, f"torch.compile of the twin, given {COMPILE_LIMIT} s: {type(error).__name__}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.compiler.reset()


class Plan(NamedTuple):
    """What a run does, at which sizes."""

    checked: Sequence[tuple[Sizes, Sequence[str]]]
    timed: Sequence[Sizes]
    blocks: Sequence[StepSizes]
    dtypes: Sequence[str]
    last: Sequence[str]  # dtypes of operations that are timed last
    ceilings: dict[str, int]  # arguments of measure.ceilings
    step: dict[str, Any]  # arguments of step.time_step
    limit: float  # seconds for everything


FULL = Plan(SMALL + MEDIUM, LARGE, BLOCKS, TIMED, LAST, {}, {}, LIMIT)
DRY_BLOCK = StepSizes("dry", width=8, heads=2, vocabulary=7, K=3, R=1, kept=0.3, B=2, T=2)
DRY_PLAN = Plan(
    ((DRY, ("fp32",)),),
    (DRY,),
    (DRY_BLOCK,),
    ("fp32",),
    (),
    {"width": 32, "copied": 1 << 12},
    {"backend": "triton", "steps": 1, "warm_up": 0},
    0,
)


def checked(plan: Sequence[tuple[Sizes, Sequence[str]]], device: torch.device, seed: int) -> list[checks.Check]:
    """Check all kernels and print what failed."""
    started = time.monotonic()
    made = checks.run_all(plan, device, seed)
    bad = [c for c in made if not c.passed]
    for c in bad:
        print(f"FAILED {c.op}, {c.size}, {c.dtype}, {c.what}: error {c.error:.3e} > {c.allowed:.3e} {c.note}")
    print(f"checks: {len(made) - len(bad)} of {len(made)} passed in {time.monotonic() - started:.0f} s", flush=True)
    return made


def measured(plan: Plan, device: torch.device, started: float, failed: Collection[str] = ()) -> dict[str, Any]:
    """Time everything but operations that failed, print the tables, and return what is written."""
    from l3d_kernels.kernels.shared.launch_table import kind_of

    deadline = started + plan.limit if plan.limit else float("inf")
    best = ceilings(device, **plan.ceilings)
    timings = time_all(plan.timed, plan.dtypes, device, best, deadline - STEP_LIMIT, plan.last, failed)
    steps = time_steps(plan.blocks, plan.dtypes, device, best, deadline - COMPILE_LIMIT, **plan.step)
    timings = compiled_too(timings, plan.timed, device, deadline - COMPILE_LIMIT if plan.limit else 0.0)
    rows = report.path_rows(timings, plan.timed, kind_of(device))
    print("rows for l3d_kernels/kernels/shared/path_table.py:")
    for key, path in rows:
        print(f"    {key!r}: {path!r},")
    print(report.table(timings, best))
    print(report.step_table(steps))
    return {
        "ceilings": best._asdict(),
        "timings": [t._asdict() for t in timings],
        "steps": [{**s._asdict(), "phases": [p._asdict() for p in s.phases]} for s in steps],
        "paths": [[*key, path] for key, path in rows],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="only check, and only at small sizes")
    parser.add_argument("--seed", type=int, help="of the checks' inputs (default: a new one)")
    parser.add_argument("--dry", action="store_true", help="all of it, tiny, on a CPU; nothing is written")
    parser.add_argument(
        "--model",
        action="store_true",
        help="print a model of a step on paper, without a GPU too; write nothing. FLOPs, bytes, launches and waits by "
        f"phase and size, and the time they take at published rates of {', '.join(gpu.name for gpu in model.GPUS)}; "
        "where bench/results holds a GPU's figures, at its measured rates, with the measured times below",
    )
    parser.add_argument("--out", type=Path, help="where to write (default: bench/results/DEVICE.json)")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    if options.model:
        if missing := registry.load_kernels():
            parser.error(f"--model counts the kernels' launches: {missing}")
        print(model.page(BLOCKS, TIMED, model.committed()))
        return 0
    seed = secrets.randbits(31) if options.seed is None else options.seed
    if options.dry:
        if os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is first imported, which torch may have done
            parser.error("--dry runs in Triton's interpreter: set TRITON_INTERPRET=1")
        made = checked(DRY_PLAN.checked, torch.device("cpu"), seed)
        measured(DRY_PLAN, torch.device("cpu"), started)
        print("dry run on a CPU: no figure above means anything; nothing was written")
        return 0 if all(c.passed for c in made) else 1
    if not torch.cuda.is_available():
        print("bench.gpu: no GPU here (torch.cuda.is_available() is False): nothing was measured or written")
        return 0
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, seed {seed}", flush=True)
    made = checked(SMALL if options.small else FULL.checked, device, seed)
    failed = sorted({c.op for c in made if not c.passed})
    if options.small:
        return 1 if failed else 0
    figures = measured(FULL, device, started, failed)
    left = int(HARD_LIMIT - (time.monotonic() - started))
    sanitized = checks.memcheck(left, seed) if left > 10 else "no time was left"
    print(f"memcheck: {sanitized}", flush=True)
    path = options.out or report.path_for(torch.cuda.get_device_name())
    content = {
        "environment": report.environment(device, seed),
        "checks": [c._asdict() for c in made],
        "memcheck": sanitized,
        **figures,
        "seconds": round(time.monotonic() - started, 1),
    }
    report.write(path, content)
    print(f"written to {path}\n{model.page(BLOCKS, TIMED, [content])}")
    if failed:
        print(f"FAILED their checks, and were not timed: {', '.join(failed)}; the steps may be wrong too")
    return 1 if failed or sanitized.startswith("FAILED") else 0


if __name__ == "__main__":
    sys.exit(main())
