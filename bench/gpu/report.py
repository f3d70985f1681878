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

from bench.gpu.measure import Ceilings, Timing

ROOT = Path(__file__).resolve().parents[2]
HEADER = ("op", "size", "dtype", "part", "ms", "% of bound", "by", "eager", "compiled", "workspace MB")


def environment(device: torch.device, seed: int) -> dict[str, Any]:
    """Return what the figures depend on."""
    import triton

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
    rows = [HEADER, *(_cells(timing) for timing in timings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _cells(t: Timing) -> tuple[str, ...]:
    def ratio(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds / t.seconds:.2f}x"

    space = "-" if t.workspace_bytes is None else f"{t.workspace_bytes / 1e6:.1f}"
    figures = (f"{t.seconds * 1e3:.3f}", f"{t.percent_of_bound:.0f}", t.bound_by)
    return (t.op, t.size, t.dtype, t.part, *figures, ratio(t.eager_seconds), ratio(t.compiled_seconds), space)
