"""What the kernel tests share: watching launches, and the tolerance against the twin (the truth is float64)."""

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l3d_kernels.kernels.shared import common

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def launches(*expected: str) -> Iterator[Counter[str]]:
    """Count kernels by name as they are launched; each expected one must be launched within the block."""
    seen: Counter[str] = Counter()

    def watch(name: str) -> None:
        seen[name] += 1

    common.WATCHERS.append(watch)
    try:
        yield seen
    finally:
        common.WATCHERS.remove(watch)
    missing = set(expected) - set(seen)
    assert not missing, f"not launched: {sorted(missing)}; launched: {dict(seen)}"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw a tensor from the standard normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_as_good(kernel: Tensor, twin: Tensor, truth: Tensor, what: str = "", eps: float | None = None) -> None:
    """Hold a kernel's result to the float64 truth: at most twice the twin's error in the same dtype, plus slack.

    The slack is four units in the last place at the largest true element; in float64, where the truth itself is
    rounded, 1e-13 of it. `eps` is the unit of the arithmetic where that is coarser than the dtype's: tf32's. Every
    element must have been written.
    """
    assert kernel.dtype == twin.dtype, f"{what}: dtype {kernel.dtype}, the twin's is {twin.dtype}"
    assert kernel.shape == twin.shape == truth.shape, f"{what}: shapes {kernel.shape}, {twin.shape}, {truth.shape}"
    if truth.numel() == 0:
        return
    unit = 1e-13 if kernel.dtype == torch.float64 else 4 * (eps or torch.finfo(kernel.dtype).eps)
    slack = unit * float(truth.abs().max())
    kernel, twin, truth = (t.detach().cpu().double() for t in (kernel, twin, truth))
    own = (kernel - truth).abs().nan_to_num(nan=torch.inf)
    allowed = 2 * float((twin - truth).abs().max()) + slack
    worst = int(own.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape))
    assert float(own.max()) <= allowed, (
        f"{what}: error {float(own.max()):.3e} > {allowed:.3e}; worst at {index}: kernel {kernel[index]:.6e}, "
        f"twin {twin[index]:.6e}, truth {truth[index]:.6e}; {int((own > allowed).sum())} of {truth.numel()} are over"
    )


Run = Callable[[dict[str, Any], str], Tensor]  # (inputs, backend) -> result


def gradients(run: Run, inputs: dict[str, Any], leaves: Sequence[str], backend: str) -> tuple[Tensor, list[Tensor]]:
    """Return the result, and the leaves' gradients for a random upstream gradient."""
    own = dict(inputs) | {name: inputs[name].detach().clone().requires_grad_() for name in leaves}
    value = run(own, backend)
    upstream = normal(*value.shape, seed=7, dtype=value.dtype)
    grads = (
        torch.autograd.grad(value, [own[name] for name in leaves], upstream, materialize_grads=True) if leaves else ()
    )
    return value.detach(), list(grads)


def to_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Cast the floating tensors among the inputs."""
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def assert_kernel(run: Run, inputs: dict[str, Any], leaves: Sequence[str], dtype: torch.dtype, *expected: str) -> None:
    """Hold value and gradients of the kernels to the truth, and prove that the expected kernels were launched.

    `inputs` are rounded to `dtype` first, so that kernel, twin and truth start from the same numbers.
    """
    inputs = to_dtype(inputs, dtype)
    with launches(*expected):
        value, grads = gradients(run, inputs, leaves, "triton")
    twin, twin_grads = gradients(run, inputs, leaves, "torch")
    truth, true_grads = gradients(run, to_dtype(inputs, torch.float64), leaves, "torch")
    assert_as_good(value, twin, truth, "value")
    for name, grad, twin_grad, true_grad in zip(leaves, grads, twin_grads, true_grads, strict=True):
        assert_as_good(grad, twin_grad, true_grad, f"gradient of {name}")


def assert_same_twice(run: Run, inputs: dict[str, Any], leaves: Sequence[str]) -> None:
    """Two runs on the same inputs give the same bits, value and gradients."""
    first, first_grads = gradients(run, inputs, leaves, "triton")
    second, second_grads = gradients(run, inputs, leaves, "triton")
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, second_grads, strict=True))


def strided(tensor: Tensor) -> Tensor:
    """Return the same values with gaps between the elements."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def execute(*arguments: str, root: Path = Path(__file__).parents[2]) -> list[dict[str, Any]]:
    """Execute jobs as PTX in a program of its own, `ptx_worker.py`, with the l3d_kernels of `root`."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(root)
    command = [sys.executable, str(Path(__file__).with_name("ptx_worker.py")), *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, cwd=root)
    assert finished.returncode == 0, finished.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(finished.stdout)
    for job in found:
        print(f"{job['job']}: {job['instructions']:,} instructions, {job['launches']} launches, {job['seconds']} s")
    return found
