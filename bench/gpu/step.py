"""A whole training step: every phase beside its roofline, extraction beside the bare passes it needs, peak memory.

A phase's roofline is the larger of its operations over the matrix rate and its bytes over the
copy rate, by the cheapest route that l3d knows, plus its launches times an empty launch (`bench.measure.launches`).
"""

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.block import PHASES, Step, StepSizes
from bench.gpu.measure import Ceilings, bound, median_seconds, synchronize, use
from bench.measure.launches import counting

STEPS, WARM_UP = 7, 2  # timed steps, and those before them


class Phase(NamedTuple):
    """One phase of a step beside its roofline."""

    name: str
    seconds: float
    flops: int
    bytes: int
    launches: int
    roofline_seconds: float


class StepTiming(NamedTuple):
    """A step of one size in one dtype."""

    size: str
    dtype: str
    seconds: float
    roofline_seconds: float
    phases: list[Phase]
    bare_seconds: float  # one forward pass, a backward pass per position without weight gradients, no hooks
    peak_bytes: int | None  # None off the GPU
    paths: dict[str, list[bool]]  # of every tensor: materialised, sampled


def work(step: Step) -> dict[str, tuple[int, int]]:
    """Count the operations and bytes of each phase of a step that was taken, by the cheapest route: (flops, bytes).

    Of a step on tensors of shapes only it is unknown which coefficients are kept: the pairs are the fewest, as if every
    sample kept equally many, and the subnetworks that move the most.
    """
    z, n, width = step.z, step.z.n_kept, step.z.width
    tensors, itemsize = 4, step.model.head.weight.element_size()
    with FlopCounterMode(display=False) as bare:
        step.bare()
    all_pairs, forming = z.T * z.K * z.R * (z.B + z.S) * width, z.S * z.T * width**2
    dense, sampled = z.K * (z.S + z.R) * width**2, z.T * z.R * (min(z.B * z.K, n) + n) * width
    routes = [  # of encoder and decoder: (what has no gradient, what has one)
        (0, 2 * all_pairs),
        (all_pairs, 2 * sampled),
        (forming, 2 * dense),
        (forming + dense, 2 * sampled),
    ]
    plain, differentiable = min(routes, key=lambda route: route[0] + 3 * route[1])
    if step.tokens.is_meta:
        pairs, moving = n * n // z.S, min(z.K, n)
    else:
        pairs = int(step.kept.row_offsets.diff().square().sum())
        moving = int(step.kept.column_offsets.diff().count_nonzero())
    gram = min(z.K**2 * z.R**2 * 2 * width, z.K * (z.K + z.R) * width**2) + z.S * z.K**2
    energies = min(pairs * z.R**2 * 2 * width, gram)
    norms = min(z.T**2 * (z.B + z.S) * width, forming)
    factors, held = step.gradients.nbytes(), sum(p.numel() for p in step.optimizer.parameters) * itemsize
    weights = tensors * width**2 * itemsize
    head, logits = step.model.head.weight.numel() * itemsize, z.S * z.vocabulary * itemsize
    return {
        # all positions pass back through the last matrix together; logits and their gradient are written and read
        "extract": (bare.get_total_flops(), weights + weights // tensors + 2 * head + 4 * logits + factors),
        "select": (2 * tensors * (plain + differentiable), held + 2 * factors + z.S * z.K * itemsize),
        "loss": (2 * tensors * (norms + energies), held // 2 + factors),
        "backward": (4 * tensors * (differentiable + energies), 2 * held + factors),  # repeats the forward's products
        # of subnetworks that move: reads the gradient, reads and writes the parameter and both moments, rescales a half
        "update": (0, 8 * held * moving // z.K),
    }


def count_launches(step: Step) -> dict[str, tuple[int, int]]:
    """Take a step and count each phase's (launches, waits for the device)."""
    at: list[tuple[int, int]] = []
    with counting(step.tokens.device) as seen:
        step.take(lambda phase: at.append((seen.count, seen.waits.total())))
    gaps = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(at)]
    return dict(zip(PHASES, gaps, strict=True))


def phase_seconds(step: Step, device: torch.device, n: int) -> list[dict[str, float]]:
    """Take n steps and return each one's seconds by phase."""
    done = []
    for _ in range(n):
        times: list[Any] = []

        def mark(name: str, times: list[Any] = times) -> None:
            if device.type != "cuda":
                times.append(time.perf_counter())
                return
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            times.append(event)

        step.take(mark)
        synchronize(device)
        gaps = [a.elapsed_time(b) / 1e3 if device.type == "cuda" else b - a for a, b in itertools.pairwise(times)]
        done.append(dict(zip(PHASES, gaps, strict=True)))
    return done


def time_step(
    z: StepSizes,
    dtype: str,
    device: torch.device,
    best: Ceilings,
    backend: str = "auto",
    steps: int = STEPS,
    warm_up: int = WARM_UP,
) -> StepTiming:
    """Time a step of one size in one dtype."""
    step = Step(z, use(dtype), device, backend)
    launches = {phase: count for phase, (count, _) in count_launches(step).items()}
    counted = work(step)
    bare = median_seconds(step.bare, device)
    phase_seconds(step, device, warm_up)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = phase_seconds(step, device, steps)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    phases = []
    for name in PHASES:
        flops, moved = counted[name]
        least = bound(flops, moved, True, dtype, best)[0] + launches[name] * best.launch_seconds
        phases.append(Phase(name, statistics.median(t[name] for t in taken), flops, moved, launches[name], least))
    total = statistics.median(sum(t.values()) for t in taken)
    least = sum(phase.roofline_seconds for phase in phases)
    paths = {name: [path.materialised, path.sampled] for name, path in step.paths.items()}
    return StepTiming(z.name, dtype, total, least, phases, bare, peak, paths)


def time_steps(
    blocks: Sequence[StepSizes],
    dtypes: Sequence[str],
    device: torch.device,
    best: Ceilings,
    deadline: float,
    **options: Any,
) -> list[StepTiming]:
    """Time a step at every size in every dtype; where one fails, say so and go on."""
    done = []
    for z in blocks:
        for dtype in dtypes:
            if time.monotonic() > deadline:
                print(f"no time was left for the step of {z.name} in {dtype}", flush=True)
                continue
            try:
                done.append(time_step(z, dtype, device, best, **options))
            except Exception as error:  # a step that does not run is named; the others are still measured
                reason = f"{type(error).__name__}: {str(error)[:300]}"
                print(f"FAILED the step of {z.name} in {dtype}: {reason}", flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return done
