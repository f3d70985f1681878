"""How things are timed: medians between events, caches flushed; and the ceilings of the same run."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLUSH = 1 << 28  # bytes written between two timed runs, more than any cache holds
SECONDS = 0.25  # of repetitions for one figure
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
PRECISION = {"tf32": "high", "fp32": "highest"}


def use(dtype: str) -> torch.dtype:
    """Set how float32 products are computed, and return the dtype of a name: "tf32" and "fp32" differ in that."""
    torch.set_float32_matmul_precision(PRECISION.get(dtype, "highest"))
    return DTYPES[dtype]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(function: Callable[[], Any], device: torch.device, seconds: float = SECONDS) -> float:
    """Return the median time of a call once it is warm, caches flushed before each."""
    function()
    synchronize(device)
    before = time.perf_counter()
    function()
    synchronize(device)
    once = max(time.perf_counter() - before, 1e-6)
    n = max(3, min(100, int(seconds / once)))
    if device.type != "cuda":
        return statistics.median(_host_seconds(function) for _ in range(n))
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
    pairs = []
    for _ in range(n):
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        stop.record()
        pairs.append((start, stop))
    synchronize(device)
    return statistics.median(start.elapsed_time(stop) / 1e3 for start, stop in pairs)


def parts(run: Callable[[dict[str, Any]], Tensor], inputs: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Return the calls to time: the forward pass and, where gradients are wanted, the backward pass alone."""
    calls: dict[str, Callable[[], Any]] = {"forward": lambda: run(inputs)}
    if wanted:
        leaves = {key: inputs[key].detach().requires_grad_() for key in wanted}
        value = run({**inputs, **leaves})
        upstream = torch.ones_like(value)
        calls["backward"] = lambda: torch.autograd.grad(value, list(leaves.values()), upstream, retain_graph=True)
    return calls


def _host_seconds(function: Callable[[], Any]) -> float:
    before = time.perf_counter()
    function()
    return time.perf_counter() - before


def workspace_bytes(function: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most memory that a call holds at a time beyond what it returns; None off the GPU."""
    if device.type != "cuda":
        return None
    function()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    synchronize(device)
    kept = torch.cuda.memory_allocated(device) - before
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak - kept


class Ceilings(NamedTuple):
    """What the device does at best, measured in this run."""

    copy_bytes_per_second: float  # read and written
    matrix_flops_per_second: dict[str, float]  # by dtype name
    launch_seconds: float  # an empty kernel, launched and finished


def ceilings(device: torch.device, width: int = 8192, copied: int = 1 << 30) -> Ceilings:
    """Measure a copy, a square matrix product per dtype, and an empty launch."""
    copy = 2 * copied / _copy_seconds(copied, device)
    rates = {dtype: 2 * width**3 / _product_seconds(width, dtype, device) for dtype in DTYPES}
    empty = torch.empty(1, device=device)
    return Ceilings(copy, rates, median_seconds(lambda: empty.zero_(), device))


def _copy_seconds(n_bytes: int, device: torch.device) -> float:
    source = torch.empty(n_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), device)


def _product_seconds(width: int, dtype: str, device: torch.device) -> float:
    a = torch.randn(width, width, device=device).to(use(dtype))
    return median_seconds(lambda: a @ a.mT, device)


class Timing(NamedTuple):
    """One operation at one size: its time beside its bound and beside torch's."""

    op: str
    size: str
    dtype: str
    part: str  # "forward" or "backward"
    seconds: float
    flops: int
    bytes: int
    bound_seconds: float  # the larger of flops over the matrix rate and bytes over the copy rate
    bound_by: str  # "matrix" or "copy"
    percent_of_bound: float  # net of the launch floor
    workspace_bytes: int | None
    eager_seconds: float | None  # the torch twin
    compiled_seconds: float | None  # torch.compile of it; None: not measured, see `note`
    note: str = ""


def bound(flops: int, moved: int, is_matrix: bool, dtype: str, best: Ceilings) -> tuple[float, str]:
    """Return the least time that the work takes on this device, and what sets it."""
    by_copy = moved / best.copy_bytes_per_second
    by_matrix = flops / best.matrix_flops_per_second[dtype] if is_matrix else 0.0
    return (by_matrix, "matrix") if by_matrix > by_copy else (by_copy, "copy")


def percent(bound_seconds: float, seconds: float, launch_seconds: float) -> float:
    """Return how much of the bound a time reaches, in percent, net of the launch floor."""
    return 100 * bound_seconds / max(seconds - launch_seconds, 1e-9)
