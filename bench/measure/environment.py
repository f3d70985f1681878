"""Where and with what a benchmark ran; written beside its figures."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def environment() -> dict[str, Any]:
    """Return the source's revision, torch's version, the machine, how many threads it gave and what else it did."""
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "revision": revision.stdout.strip(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": _load(),
    }


def described(where: dict[str, Any]) -> str:
    """Say in a sentence what made some figures.

    >>> where = {"revision": "1a2b3c4", "torch": "2.13.0", "machine": "x86_64", "cores": 2, "threads": 1, "load": 0.3}
    >>> described(where)
    'Measured at revision 1a2b3c4 with torch 2.13.0 on 1 thread of an x86_64 machine of 2 cores, load average 0.3.'
    """
    threads = "1 thread" if where["threads"] == 1 else f"{where['threads']} threads"
    machine = where["machine"] + (f" ({where['processor']})" if where.get("processor") else "")
    start = f"Measured at revision {where['revision']} with torch {where['torch']}"
    busy = f", load average {where['load']}" if where.get("load") is not None else ""
    return f"{start} on {threads} of an {machine} machine of {where['cores']} cores{busy}."


def _load() -> float | None:
    """Return how many processes ran or waited over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    """Return the processor's name, as Linux tells it; empty where nothing does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
