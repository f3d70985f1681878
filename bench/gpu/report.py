"""What a run leaves behind: a JSON file with its environment, and a short table."""

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.block import PHASES
from bench.gpu.cases import Sizes
from bench.gpu.measure import Ceilings, Timing
from bench.gpu.step import StepTiming

ROOT = Path(__file__).resolve().parents[2]
STEP_HEADER = ("step", "dtype", "ms", "x roofline", *PHASES, "extract/bare", "peak GB")
HEADER = ("op", "size", "dtype", "part", "ms", "% of bound", "by", "eager", "compiled", "workspace MB")


def environment(device: torch.device, seed: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    import triton

    if device.type != "cuda":
        return {"device": "cpu", "torch": torch.__version__, "triton": triton.__version__}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
    }


def _commit() -> str | None:
    """Return the source's commit, with a mark if the working tree differs; None outside a repository."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def path_for(device_name: str) -> Path:
    """Return where a device's results are committed."""
    return ROOT / "bench" / "results" / f"{re.sub(r'[^A-Za-z0-9]+', '-', device_name).strip('-').lower()}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def table(timings: Sequence[Timing], best: Ceilings) -> str:
    """Return the ceilings and a line per timing; torch's times are relative to ours: above 1 it is slower."""
    rates = ", ".join(f"{dtype} {rate / 1e12:.0f} TFLOP/s" for dtype, rate in best.matrix_flops_per_second.items())
    lines = [
        f"ceilings: copy {best.copy_bytes_per_second / 1e9:.0f} GB/s, {rates}, "
        f"empty launch {best.launch_seconds * 1e6:.1f} us"
    ]
    return "\n".join([*lines, *aligned([HEADER, *(_cells(timing) for timing in timings)])])


def step_table(steps: Sequence[StepTiming]) -> str:
    """Return a line per step: its time over its roofline, each phase as "ms (x roofline)", extraction over bare."""
    rows = [STEP_HEADER]
    for s in steps:
        phases = [f"{p.seconds * 1e3:.2f} ({p.seconds / p.roofline_seconds:.1f})" for p in s.phases]
        total = (f"{s.seconds * 1e3:.2f}", f"{s.seconds / s.roofline_seconds:.2f}")
        peak = "-" if s.peak_bytes is None else f"{s.peak_bytes / 1e9:.2f}"
        rows.append((s.size, s.dtype, *total, *phases, f"{s.phases[0].seconds / s.bare_seconds:.2f}", peak))
    return "\n".join(aligned(rows))


def path_rows(timings: Sequence[Timing], sizes: Sequence[Sizes], kind: str) -> list[tuple[tuple[str, ...], str]]:
    """Return the rows for `path_table` that these timings ask for: the fastest of each, both passes."""
    from l3d_kernels.kernels.shared.path_table import CHUNKED, FUSED, TWIN
    from l3d_kernels.registry import width_class

    widths = {z.name: width_class(z.O) for z in sizes}
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for t in timings:
        path = {"project_fused": FUSED, "project_chunked": CHUNKED}.get(t.op)
        if path is None:
            continue
        row = ("project", kind, "16" if t.dtype in ("bf16", "fp16") else t.dtype, widths[t.size])
        own = times.setdefault(row, {})
        own[path] = own.get(path, 0.0) + t.seconds
        if t.eager_seconds is not None and path == FUSED:  # the twin is the same for both
            own[TWIN] = own.get(TWIN, 0.0) + t.eager_seconds
    return [(row, min(own, key=own.__getitem__)) for row, own in times.items()]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(t: Timing) -> tuple[str, ...]:
    def ratio(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds / t.seconds:.2f}x"

    space = "-" if t.workspace_bytes is None else f"{t.workspace_bytes / 1e6:.1f}"
    figures = (f"{t.seconds * 1e3:.3f}", f"{t.percent_of_bound:.0f}", t.bound_by)
    return (t.op, t.size, t.dtype, t.part, *figures, ratio(t.eager_seconds), ratio(t.compiled_seconds), space)
