"""How much memory this process holds, and has held at the most."""

import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")  # on Linux


def memory_now() -> int:
    """Return the bytes this process holds now; 0 where the system does not say."""
    return _kilobytes("VmRSS") * 1024


def peak_memory(device: torch.device | None = None) -> int:
    """Return the most bytes this process has held, on a GPU of its memory; 0 where the system does not say."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    if peak := _kilobytes("VmHWM"):  # getrusage's would count what the process that started this one held
        return peak * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _kilobytes(name: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
