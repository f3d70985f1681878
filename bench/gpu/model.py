"""Model a training step on paper, without a GPU: its work, launches and waits, and the time these take on known GPUs.

A phase is modelled as max(FLOPs / matrix rate, bytes / memory rate) + launches * launch time + waits * wait time. FLOPs
and bytes are the least that `step.work` counts, so that the work is modelled too fast. No launch overlaps with work or
with another, as if the host were always late, so that launches are modelled too slow. Launches and waits are counted on
tensors of shapes only. Where `bench.gpu` has run on a GPU, its measured rates replace the published ones and its
measured times stand below the modelled ones.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu.block import PHASES, Step, StepSizes
from bench.gpu.measure import DTYPES, Ceilings, bound
from bench.gpu.report import ROOT, aligned
from bench.gpu.step import count_launches, work
from bench.measure.launches import weights_of_shapes_only

# Assumed, not measured: what the host takes to launch an operation, a few microseconds by most reports; and to notice
# that the device is done and fill its queue again.
LAUNCH_SECONDS, WAIT_SECONDS = 5e-6, 20e-6
ASSUMED = f"""\
A model on paper. Lines that begin with `modelled` were computed, on no GPU:
max(FLOPs / matrix rate, bytes / memory rate) + launches x launch time + waits x wait time.
FLOPs and bytes are the least by the cheapest route, with the fewest pairs of kept coefficients; in the update as many
subnetworks move as can. Launches and waits are counted on tensors of shapes only, after a run's first batch.
Assumed, not measured: {1e6 * WAIT_SECONDS:.0f} us a wait and, with published rates, {1e6 * LAUNCH_SECONDS:.0f} us a \
launch, one after the other."""


@dataclass(frozen=True)
class Gpu:
    """A GPU's rates, from its data sheet or from a run of `bench.gpu`, and the times of the steps in that run."""

    name: str  # a part of the device's name as torch gives it
    rates: Ceilings
    source: str = "published"
    seconds: Mapping[tuple[str, str], Mapping[str, float]] = field(default_factory=dict)  # (size, dtype) -> by phase


def _published(name: str, bf16: float, tf32: float, memory: float) -> Gpu:
    """Make a row of the table: dense products in TFLOP/s, summed in float32, and memory in TB/s."""
    return Gpu(name, Ceilings(memory * 1e12, {"bf16": bf16 * 1e12, "tf32": tf32 * 1e12}, LAUNCH_SECONDS))


# peaks without sparsity, which no kernel reaches; nothing here is measured
GPUS = (
    _published("A100", 312, 156, 2.039),  # NVIDIA A100 data sheet: SXM, 80 GB
    _published("H100", 989.4, 494.7, 3.35),  # NVIDIA H100 data sheet: SXM, half of the rates with sparsity
    _published("H200", 989.4, 494.7, 4.8),  # NVIDIA H200 data sheet: SXM, half of the rates with sparsity
    _published("RTX 4090", 165.2, 82.6, 1.008),  # NVIDIA Ada architecture white paper, appendix on the RTX 4090
    _published("MI300", 1307.4, 653.7, 5.3),  # AMD Instinct MI300X data sheet
)


class Counted(NamedTuple):
    """What a phase asks of a GPU."""

    flops: int
    bytes: int
    launches: int
    waits: int


def count(z: StepSizes, dtype: str) -> dict[str, Counted]:
    """Count each phase of a step as a run takes it after its first, on tensors of shapes only."""
    with weights_of_shapes_only():
        step = Step(z, DTYPES[dtype], torch.device("meta"), "auto")
        step.extractor._batches, step.extractor.check_values = 1, False  # as after a run's first batch
        count_launches(step)  # what is found out once
        asked, done = count_launches(step), work(step)
    return {phase: Counted(*done[phase], *asked[phase]) for phase in PHASES}


def modelled_seconds(counted: Counted, dtype: str, rates: Ceilings) -> float:
    """Return the time that a phase is modelled to take."""
    least, _ = bound(counted.flops, counted.bytes, True, dtype, rates)
    return least + counted.launches * rates.launch_seconds + counted.waits * WAIT_SECONDS


def with_measured(results: Iterable[Mapping[str, Any]]) -> list[Gpu]:
    """Return the table with what `bench.gpu` has measured: rates, and steps unless a check failed in that run.

    A GPU that the table does not know gets a row of its own.
    """
    known = {gpu.name: gpu for gpu in GPUS}
    for content in results:
        device = content["environment"]["device"]
        name = next((name for name in known if re.search(rf"\b{re.escape(name)}(?!\d)", device)), device)
        trusted = content["steps"] if all(check["passed"] for check in content["checks"]) else []
        seconds = {
            (step["size"], step["dtype"]): {phase["name"]: phase["seconds"] for phase in step["phases"]}
            for step in trusted
        }
        known[name] = Gpu(name, Ceilings(**content["ceilings"]), "measured", seconds)
    return list(known.values())


def committed(folder: Path = ROOT / "bench" / "results") -> list[dict[str, Any]]:
    """Read the results of `bench.gpu` in a folder; other benchmarks' files have no ceilings."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [content for content in contents if "ceilings" in content]


def table(z: StepSizes, dtype: str, gpus: Sequence[Gpu]) -> str:
    """Return a modelled line per phase and, below it, a measured one where a GPU has run the step."""
    counted = count(z, dtype)
    total = {**counted, "total": Counted(*map(sum, zip(*counted.values(), strict=True)))}
    rows = [("", "phase", "GFLOP", "MB", "launches", "waits", *(f"{gpu.name} ms" for gpu in gpus))]
    for phase, c in total.items():
        parts = PHASES if phase == "total" else (phase,)
        counts = (f"{c.flops / 1e9:.2f}", f"{c.bytes / 1e6:.1f}", str(c.launches), str(c.waits))
        own = [sum(modelled_seconds(counted[part], dtype, gpu.rates) for part in parts) for gpu in gpus]
        rows.append(("modelled", phase, *counts, *(f"{1e3 * seconds:.3f}" for seconds in own)))
        found = [gpu.seconds.get((z.name, dtype)) for gpu in gpus]
        if any(found):
            times = [f"{1e3 * sum(each[part] for part in parts):.3f}" if each else "-" for each in found]
            rows.append(("measured", phase, *[""] * len(counts), *times))
    free = [c._replace(launches=0, waits=0) for c in counted.values()]
    alone = [1e3 * sum(modelled_seconds(c, dtype, gpu.rates) for c in free) for gpu in gpus]
    rows.append(("modelled", "total, were launches free", *[""] * 4, *(f"{ms:.3f}" for ms in alone)))
    sizes = f"width {z.width}, S {z.S}, T {z.T}, K {z.K}, R {z.R}, N {z.n_kept}"
    return "\n".join([f"A step of {z.name} in {dtype}, modelled: {sizes}", *aligned(rows)])


def page(blocks: Sequence[StepSizes], dtypes: Sequence[str], results: Iterable[Mapping[str, Any]]) -> str:
    """Return what the model assumes, and a table per size and dtype, with what runs of `bench.gpu` measured."""
    gpus, lines = with_measured(results), [ASSUMED]
    if all(gpu.source == "published" for gpu in gpus):
        lines.append("There are no results of a GPU (`python3 -m bench.gpu` makes them): nothing below is measured.")
    for gpu in gpus:
        rates = [f"{dtype} {gpu.rates.matrix_flops_per_second[dtype] / 1e12:.1f} TFLOP/s" for dtype in dtypes]
        memory = f"memory {gpu.rates.copy_bytes_per_second / 1e12:.2f} TB/s"
        lines.append(f"{gpu.name}, {gpu.source} rates: {', '.join([*rates, memory])}")
    return "\n\n".join(["\n".join(lines), *(table(z, dtype, gpus) for z in blocks for dtype in dtypes)])
