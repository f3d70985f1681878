"""Whether the kernels are right here: against float64, on fresh random inputs, outputs filled with NaN first.

A result may be off by twice the torch twin's error in the same dtype, plus four units in the last place (of tf32, where
products are made in it) of the largest true element: the rule of tests/support/tools.py. Where a result has few
elements its twin may be exact by luck; several draws are then compared as one.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import l3d_kernels as lk
from bench.gpu.cases import OPS, Inputs, Sizes, make
from bench.gpu.measure import use
from l3d_kernels.sparse import SparseCoefficients

ROOT = Path(__file__).resolve().parents[2]
FEW = 64  # coefficients of a problem so small that it is drawn DRAWS times
DRAWS = 16
TF32_EPS = 2.0**-10


class Check(NamedTuple):
    """One result of one operation beside its truth."""

    op: str
    size: str
    dtype: str
    what: str  # "value" or whose gradient
    error: float  # the largest
    allowed: float
    passed: bool
    note: str = ""  # the worst element of a failure


def check(name: str, sizes: Sizes, dtype: str, device: torch.device, generator: torch.Generator) -> list[Check]:
    """Check an operation's value and gradients at one size in one dtype."""
    torch_dtype = use(dtype)
    owns: list[dict[str, Tensor]] = []
    twins, truths = list(owns), list(owns)
    for _ in range(DRAWS if sizes.S * sizes.K < FEW else 1):
        inputs = make(name, sizes, torch_dtype, device, generator)
        with _poisoned() as launched:
            if name == "batch_topk":
                wrong = _differing(inputs)
            elif name == "project_topk" and (note := _misplaced(inputs)):
                return [Check(name, sizes.name, dtype, "places", torch.inf, 0.0, False, note)]
            else:
                owns.append(results(name, inputs, "triton"))
        if not launched:
            return [Check(name, sizes.name, dtype, "launch", torch.inf, 0.0, False, "no kernel was launched")]
        if name == "batch_topk":
            if wrong:
                return [Check(name, sizes.name, dtype, "fields", torch.inf, 0.0, False, f"differ: {wrong}")]
            continue
        twins.append(results(name, inputs, "torch"))
        truths.append(results(name, widened(inputs), "torch"))
    if name == "batch_topk":  # no tolerance: every field is the twin's, bit for bit
        return [Check(name, sizes.name, dtype, "fields", 0.0, 0.0, True)]

    def every(draws: list[dict[str, Tensor]], what: str) -> Tensor:
        return draws[0][what] if len(draws) == 1 else torch.stack([draw[what] for draw in draws])

    return [_compare(name, sizes, dtype, what, *(every(d, what) for d in (owns, twins, truths))) for what in owns[0]]


@contextmanager
def _poisoned() -> Iterator[list[str]]:
    """Fill what kernels are to write with NaN, and numbers that are no index; list the kernels launched within."""
    from l3d_kernels.kernels.shared import common

    launched: list[str] = []
    watch = launched.append
    common.WATCHERS.append(watch)
    common.POISON = True
    try:
        yield launched
    finally:
        common.POISON = False
        common.WATCHERS.remove(watch)


def results(name: str, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Return an operation's value and its gradients, as compared."""
    op = OPS[name]
    own = inputs | {key: inputs[key].clone() for key in op.written}
    return outcome(lambda i: op.compared(op.run(i, backend)), own, op.leaves)


def outcome(run: Callable[[Inputs], Tensor], inputs: Inputs, wanted: Sequence[str]) -> dict[str, Tensor]:
    """Return a function's value, and its gradients to the inputs wanted for an upstream gradient from -1 to 1."""
    leaves = {key: inputs[key].detach().requires_grad_() for key in wanted}
    value = run({**inputs, **leaves})
    if not leaves:
        return {"value": value.detach()}
    upstream = torch.linspace(-1, 1, value.numel(), device=value.device, dtype=value.dtype).view_as(value)
    grads = torch.autograd.grad(value, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True)
    return {"value": value.detach(), **dict(zip(leaves, grads, strict=True))}


def widened(inputs: Inputs) -> Inputs:
    """Return the same numbers in float64."""

    def wide(value: Any) -> Any:
        if isinstance(value, SparseCoefficients):
            return value._replace(values=value.values.double(), threshold=value.threshold.double())
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {key: wide(value) for key, value in inputs.items()}


def _compare(name: str, z: Sizes, dtype: str, what: str, own: Tensor, twin: Tensor, truth: Tensor) -> Check:
    if truth.numel() == 0:
        return Check(name, z.name, dtype, what, 0.0, 0.0, own.shape == truth.shape)
    error = (own.double() - truth).abs().nan_to_num(nan=torch.inf)
    slack = 4 * (TF32_EPS if dtype == "tf32" else torch.finfo(own.dtype).eps) * float(truth.abs().max())
    allowed = 2 * float((twin.double() - truth).abs().max()) + slack
    worst = int(error.argmax())
    largest = float(error.flatten()[worst])
    passed = largest <= allowed and own.dtype == twin.dtype
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape)]
    values = [float(t.flatten()[worst]) for t in (own, twin, truth)]
    note = "" if passed else "worst at {}: kernel {:.6e}, twin {:.6e}, truth {:.6e}".format(index, *values)
    return Check(name, z.name, dtype, what, largest, allowed, passed, note)


def _differing(inputs: Inputs) -> list[str]:
    """Return the fields of batch_topk's result that are not the twin's."""
    own, twin = (lk.batch_topk(inputs["coefficients"], inputs["n"], backend=b) for b in ("triton", "torch"))
    return [field for field, a, b in zip(own._fields[:-1], own[:-1], twin[:-1], strict=True) if not torch.equal(a, b)]


def _misplaced(inputs: Inputs) -> str:
    """Say where project_topk's values are not, to rounding, the coefficients at the places that it names."""
    arguments = [inputs[key] for key in ("x", "dy", "left", "right")]
    kept = lk.project_topk(*arguments, inputs["n"], backend="triton")
    expected = lk.project(*arguments, backend="triton")[kept.rows, kept.columns]
    wrong = int(((kept.values - expected).abs() > 0.05 * expected.abs().max()).sum())
    return f"{wrong} values are not those of their places" if wrong else ""


def run_all(plan: Sequence[tuple[Sizes, Sequence[str]]], device: torch.device, seed: int) -> list[Check]:
    """Check every operation at every size in the dtypes planned for it."""
    generator = torch.Generator(device).manual_seed(seed)
    done: list[Check] = []
    for name in OPS:
        for z, dtypes in plan:
            for dtype in dtypes:
                try:
                    done += check(name, z, dtype, device, generator)
                except Exception as error:  # a kernel that does not run fails its check; the others still run
                    note = f"{type(error).__name__}: {str(error)[:300]}"
                    done.append(Check(name, z.name, dtype, "run", torch.inf, 0.0, False, note))
    return done


def memcheck(seconds: float, seed: int) -> str:
    """Run the small checks under compute-sanitizer, if it is there; return what became of it.

    Calls of the driver's that fail by design, such as queries of symbols, are not looked at: only accesses to memory.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "compute-sanitizer is not installed"
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "bench.gpu", "--small", "--seed", str(seed)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    if run.returncode == 0:
        return "passed"
    return f"FAILED (exit {run.returncode}): {(run.stdout + run.stderr)[-1500:]}"
