"""Run the ops' own Python on CPU tensors with kernels compiled for sm_80, each executed as PTX: see `main`.

A program of its own, since Triton's interpreter must be off when the kernels are imported.
"""

import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "kernels")]

import torch  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402

import l3d_kernels as lk  # noqa: E402
from l3d_kernels import registry  # noqa: E402

assert registry.load_kernels() == ""
import ptx  # noqa: E402
from l3d_kernels.kernels.project import project  # noqa: E402
from l3d_kernels.kernels.shared import common  # noqa: E402

from op_cases import OPS, Case, Op, decode_inputs, make  # noqa: E402
from tools import Run, assert_as_good, gradients, normal, to_dtype  # noqa: E402

TYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TYPES |= {"int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "bool": "i1"}
TARGET = GPUTarget("cuda", 80, 32)


def signature_of(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Return a launch's types, constants and attributes, as Triton's own launcher specialises them."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name], number = "*" + TYPES[str(value.dtype)[6:]], value.data_ptr()
        else:
            signature[name], number = "i32" if -(2**31) <= value < 2**31 else "i64", value
        if number % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_ptx(kernel: Any, signature: Any, options: dict[str, int]) -> tuple[str, dict[str, Any]]:
    """Compile a launch as far as PTX: the text, and the metadata with its bytes of shared memory."""
    source, backend = ASTSource(kernel, *signature), make_backend(TARGET)
    parsed = backend.parse_options({**options, **source.parse_options()})
    context, stages = ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, parsed, source.language)
    functions = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = source.make_ir(TARGET, parsed, *functions, context)
    metadata = {"target": TARGET, **parsed.__dict__}
    for stage in ("ttir", "ttgir", "llir", "ptx"):
        module = stages[stage](module, metadata)
    return str(module), metadata


class Executed(NamedTuple):
    """One launch: the kernel's name, instructions that its warps executed, and seconds."""

    kernel: str
    instructions: int
    seconds: float


class Launcher:
    """Launches kernels in place of `common.launch`, as PTX; `edit` may change the text of one before it runs."""

    def __init__(self) -> None:
        self.done: list[Executed] = []
        self.kernels: dict[Any, ptx.Kernel] = {}
        self.edit: Callable[[str, str], str] = lambda name, text: text

    def __call__(self, kernel: Any, grid: Sequence[int], row: Any, device: torch.device, **arguments: Any) -> None:
        if 0 in grid:
            return
        name, began = kernel.fn.__name__, time.process_time()
        for watcher in common.WATCHERS:
            watcher(name)
        own, options = {**arguments, **row.blocks}, row.options("sm_80")
        signature = signature_of(kernel, own)
        key = (name, repr(signature), repr(options))
        if key not in self.kernels:
            text, metadata = compile_ptx(kernel, signature, options)
            self.kernels[key] = ptx.Kernel(self.edit(name, text), metadata["shared"])
        passed = [own[n] for n, kind in signature[0].items() if kind != "constexpr"]
        count = self.kernels[key].launch(tuple(grid), passed, seed=len(self.done))
        self.done.append(Executed(name, count, time.process_time() - began))


def install() -> Launcher:
    """Let backend="triton" take CPU tensors, and launch what it launches as PTX for sm_80."""
    launcher = Launcher()
    registry.interpreted, common.kind_of, common.launch = lambda: True, lambda device: "sm_80", launcher
    common.POISON = True
    return launcher


# --- the ops and sizes ------------------------------------------------------------------------------------------

# sizes that nothing divides, of several of sm_80's tiles, and such that 16 divides; A, L, D, k and V are the decoders'
SIZES = {
    "odd": Case(B=2, S=6, T=3, I=5, O=7, K=7, R=3, kept=16),
    "tiles": Case(B=3, S=6, T=23, I=71, O=135, K=19, R=7, kept=40),
    "divisible": Case(B=16, S=16, T=16, I=32, O=48, K=16, R=16, kept=64),
}
DECODED = {"odd": (5, 3, 11, 7), "tiles": (9, 21, 13, 1100), "divisible": (16, 16, 32, 48)}
HEAD = {"odd": (5, 37, 7), "tiles": (70, 150, 33), "divisible": (16, 64, 32)}  # S, V, D


def inputs_of(name: str, size: str) -> dict[str, Any]:
    if name == "sparse_decode":
        indices, values, weight = decode_inputs(*DECODED[size])
        return {"indices": indices, "values": values, "weight": weight}
    if name == "softmax_mean":
        S, V, D = HEAD[size]
        return {"hidden": normal(S, D, seed=1), "weight": normal(V, D, seed=2), "bias": normal(V, seed=3)}
    inputs = make(SIZES[size])
    if name in ("batch_topk", "project_topk"):
        inputs |= {"n": SIZES[size].kept, "c": normal(SIZES[size].S, 16 * SIZES[size].K, seed=8)}
        inputs["base"] = normal(SIZES[size].S, SIZES[size].K, seed=9)
    return inputs


class Backend:
    """The ops of one backend."""

    def __init__(self, backend: str):
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return functools.partial(getattr(lk, name), backend=self.backend)


OTHERS: dict[str, Op] = {
    "sparse_decode": Op(lambda o, i: o.sparse_decode(i["indices"], i["values"], i["weight"]), None, ("values", "weight")),
    "softmax_mean": Op(lambda o, i: o.softmax_mean(i["hidden"], i["weight"], i["bias"]), None, ()),
    "batch_topk": Op(lambda o, i: o.batch_topk(i["c"], i["n"]).values, None, ("c",)),
}
NAMES = [name for name in lk.__all__ if name in OPS or name in OTHERS or name == "project_topk"]


def check(name: str, size: str, kind: str) -> None:
    """Hold an op's value and gradients to the truth, by the tests' rule; `kind` is a dtype or "tf32"."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    eps = torch.finfo(torch.float16 if kind == "tf32" else dtype).eps  # tf32 keeps as many bits as float16
    inputs = to_dtype(inputs_of(name, size), dtype)
    if name == "project_topk":
        return check_topk(inputs, kind, eps)
    op = OPS.get(name) or OTHERS[name]
    run: Run = lambda i, backend: op.run(Backend(backend), i)  # noqa: E731
    leaves = [leaf for leaf in op.leaves if inputs[leaf].is_floating_point()]
    value, grads = as_tf32(kind, lambda: gradients(run, inputs, leaves, "triton"))
    twin, twin_grads = gradients(run, inputs, leaves, "torch")
    truth, true_grads = gradients(run, to_dtype(inputs, torch.float64), leaves, "torch")
    assert_as_good(value, twin, truth, "value", eps)
    for leaf, grad, twin_grad, true_grad in zip(leaves, grads, twin_grads, true_grads, strict=True):
        assert_as_good(grad, twin_grad, true_grad, f"gradient of {leaf}", eps)
    if name == "batch_topk":
        own, other = (lk.batch_topk(inputs["c"], inputs["n"], backend=backend) for backend in ("triton", "torch"))
        assert all(torch.equal(a, b) for a, b in zip(own[:-1], other[:-1], strict=True)), "another selection"


def check_topk(inputs: dict[str, Any], kind: str, eps: float) -> None:
    """What is kept are the largest of the kernel's own coefficients; these, and the gradients, keep the rule."""
    factors = ("x", "dy", "left", "right")
    leaves = ("left", "right")

    def select(i: dict[str, Any], backend: str) -> Any:
        return lk.project_topk(*(i[f] for f in factors), i["n"], i["base"], backend=backend)

    dense = as_tf32(kind, lambda: project.coefficients(*(inputs[f] for f in factors), inputs["base"], None))
    kept = as_tf32(kind, lambda: select(inputs, "triton"))
    expected = lk.batch_topk(dense, inputs["n"], backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(kept[:-1], expected[:-1], strict=True)), "another selection"
    exact = to_dtype(inputs, torch.float64)
    twin, truth = (i["base"] + lk.project(*(i[f] for f in factors), backend="torch") for i in (inputs, exact))
    assert_as_good(dense, twin, truth, "coefficients", eps)
    _, grads = as_tf32(kind, lambda: gradients(lambda i, b: select(i, b).values, inputs, leaves, "triton"))
    at: Run = lambda i, b: lk.project_at(*(i[f] for f in factors), kept, backend=b)  # noqa: E731
    (_, twins), (_, truths) = gradients(at, inputs, leaves, "torch"), gradients(at, exact, leaves, "torch")
    for leaf, grad, twin_grad, true_grad in zip(leaves, grads, twins, truths, strict=True):
        assert_as_good(grad, twin_grad, true_grad, f"gradient of {leaf}", eps)


def as_tf32(kind: str, call: Callable[[], Any]) -> Any:
    """Call with torch's float32 precision "high" where kind is "tf32", else "highest"."""
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        return call()
    finally:
        torch.set_float32_matmul_precision("highest")


def main() -> None:
    """Run the jobs of the command line, NAME/SIZE/KIND each; print a JSON list of what each did or raised."""
    launcher, found = install(), []
    for job in sys.argv[1:]:
        launcher.done.clear()
        began, error = time.process_time(), ""
        try:
            check(*job.split("/"))
        except Exception as exception:
            error = f"{type(exception).__name__}: {exception}" if isinstance(exception, AssertionError) else traceback.format_exc()
        counts = {"instructions": sum(own.instructions for own in launcher.done), "launches": len(launcher.done)}
        found.append({"job": job, "error": error, **counts, "seconds": round(time.process_time() - began, 2)})
        print(found[-1], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
