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
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "kernels")]

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.compiler.compiler import make_backend  # noqa: E402

import l3d_kernels as lk  # noqa: E402
from l3d_kernels import registry  # noqa: E402

assert registry.load_kernels() == ""
from l3d_kernels.kernels.decode import softmax_mean  # noqa: E402
from l3d_kernels.kernels.project import project  # noqa: E402
from l3d_kernels.kernels.shared import common  # noqa: E402
from l3d_kernels.kernels.shared.launch_table import Launch  # noqa: E402
from l3d_kernels.kernels.update import adam  # noqa: E402

import ptx  # noqa: E402
from op_cases import OPS, Case, Op, decode_inputs, kept_of, make  # noqa: E402
from tools import Run, assert_as_good, gradients, normal, to_dtype  # noqa: E402

TYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TYPES |= {"int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "bool": "i1"}
TARGET = GPUTarget("cuda", 80, 32)


def signature_of(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Return a launch's types, constants and attributes, as Triton's own launcher specialises them."""
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}

    def specialised(path: tuple[int, ...], value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(specialised((*path, j), member) for j, member in enumerate(value))
        if kernel.params[path[0]].is_constexpr or value is None or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor):
            kind, number = "*" + TYPES[str(value.dtype)[6:]], value.data_ptr()
        else:
            kind, number = "i32" if -(2**31) <= value < 2**31 else "i64", value
        if number % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    signature = {name: specialised((i,), arguments[name]) for i, name in enumerate(kernel.arg_names)}
    return signature, constants, attributes


def passed(kind: Any, value: Any) -> list[Any]:
    """Return what of an argument the compiled code takes: tuples member by member, no constants."""
    if isinstance(kind, tuple):
        return [each for own in zip(kind, value, strict=True) for each in passed(*own)]
    return [] if kind == "constexpr" else [value]


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
    """Launches kernels in place of `common.launch`, as PTX.

    With `unordered` barriers are passed over, and only global memory is looked at. With `deleting`, every kernel runs
    again without each of its barriers and waits for copies, one at a time.
    """

    def __init__(self) -> None:
        self.done: list[Executed] = []
        self.kernels: dict[Any, ptx.Kernel] = {}
        self.deleting = self.unordered = False
        self.deleted: dict[str, str] = {}  # what was noticed where a barrier or wait was left out, or why nothing was

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
            self.kernels[key] = ptx.Kernel(text, metadata["shared"])
            self.kernels[key].unordered = self.unordered
        values = [each for n, kind in signature[0].items() for each in passed(kind, own[n])]
        before = bytes_of(values) if self.deleting else []
        count = self.kernels[key].launch(tuple(grid), values, seed=len(self.done))
        if self.deleting and self.kernels[key].synchronisations:
            self.delete(self.kernels[key], name, tuple(grid), values, before)
        self.done.append(Executed(name, count, time.process_time() - began))

    def delete(self, kernel: ptx.Kernel, name: str, grid: Any, passed: list[Any], before: list[torch.Tensor]) -> None:
        after = [own.clone() for own in bytes_of(passed, False)]
        for number, line in enumerate(kernel.synchronisations):
            kernel.skipped, kernel.passed = {line}, set()
            for own, start in zip(bytes_of(passed, False), before, strict=True):
                own.copy_(start)
            try:
                kernel.launch(grid, passed)
                pairs = zip(bytes_of(passed, False), after, strict=True)
                noticed = (
                    why_redundant(kernel.passed) if all(torch.equal(*pair) for pair in pairs) else "another result"
                )
            except ptx.Fault as fault:
                noticed = str(fault)
            text = kernel.text.split("\n")[line - 1].strip().replace("\t", "")
            place = f"{name} {number}: {text} ({kernel.sources[line]})"
            if self.deleted.get(place, "redundant").startswith("redundant"):
                self.deleted[place] = noticed
        kernel.skipped = set()
        for own, end in zip(bytes_of(passed, False), after, strict=True):
            own.copy_(end)


def why_redundant(passed: set[str]) -> str:
    """Return why nothing was noticed without a barrier, from what was met in its place."""
    if "busy" in passed:
        return "redundant: what a warp touches up to the next barrier, no other touched since the barrier before"
    return "redundant: nothing was touched since the barrier before" if passed else "redundant: it is not reached"


def bytes_of(arguments: list[Any], is_copy: bool = True) -> list[torch.Tensor]:
    """Return the bytes behind tensors, each storage once."""
    storages = {a.untyped_storage().data_ptr(): a.untyped_storage() for a in arguments if isinstance(a, torch.Tensor)}
    own = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]
    return [t.clone() for t in own] if is_copy else own


def install() -> Launcher:
    """Let backend="triton" take CPU tensors, and launch what it launches as PTX for sm_80."""
    launcher = Launcher()
    registry.interpreted, common.kind_of, common.launch = lambda: True, lambda device: "sm_80", launcher
    common.POISON, adam.LEAST_SHARE = True, 400  # so that a slice of several tiles is cut into shares
    return launcher


# --- the ops and sizes ------------------------------------------------------------------------------------------

# sizes that nothing divides, of several of sm_80's tiles, and such that 16 divides; then other forms of kernels
SIZES = {
    "odd": Case(B=2, S=6, T=3, I=5, O=7, K=7, R=3, kept=16),
    "tiles": Case(B=3, S=12, T=23, I=71, O=135, K=40, R=7, kept=120),
    "divisible": Case(B=16, S=16, T=16, I=80, O=144, K=16, R=16, kept=96),
    "loops": Case(B=1, S=2, T=40, I=71, O=135, K=3, R=40, kept=5),
    "narrow": Case(B=1, S=2, T=2, I=16, O=64, K=3, R=40, kept=5),
    "alone": Case(B=5, S=5, T=3, I=5, O=7, K=7, R=3, kept=9),
    "indices": Case(B=2, S=6, T=3, I=5, O=7, K=7, R=3, kept=16, indices=True),
    "single": Case(B=6, S=6, T=1, I=5, O=7, K=7, R=1, kept=16),
}
PROGRAMS = {"tiles": 2, "divisible": 2, "loops": 1, "narrow": 1}  # sums are split over so few: each has several entries
DECODED = {
    "odd": (5, 3, 11, 7),
    "tiles": (9, 21, 13, 1100),
    "divisible": (16, 16, 32, 48),
    "loops": (3, 9, 3, 1100),
}  # A, k, L, D
HEAD = {"odd": (5, 37, 7), "tiles": (70, 150, 33), "divisible": (16, 64, 32), "loops": (5, 150, 33)}  # S, V, D


def inputs_of(name: str, size: str) -> dict[str, Any]:
    if name.startswith("sparse_decode"):
        indices, values, weight = decode_inputs(*DECODED[size])
        codes = {"indices": indices, "values": values, "weight": weight, "offsets": None}
        if name == "sparse_decode_flat":
            cuts = torch.arange(len(indices) + 1).pow(2) % (indices.numel() + 1)
            cuts[0], cuts[-1] = 0, indices.numel()
            codes |= {"indices": indices.flatten(), "values": values.flatten(), "offsets": cuts.sort().values}
        return codes
    if name.startswith("softmax_mean"):
        S, V, D = HEAD[size]
        return {"hidden": normal(S, D, seed=1), "weight": normal(V, D, seed=2), "bias": normal(V, seed=3)}
    inputs = make(SIZES[size])
    inputs["left"] /= 8  # so that squared norms stay in float16's range
    if inputs["x"].is_floating_point():
        inputs["x"] /= 4
    if name in ("batch_topk", "project_topk", "mirror"):
        inputs |= {"n": SIZES[size].kept, "c": normal(SIZES[size].S, 16 * SIZES[size].K, seed=8)}
        inputs["base"] = normal(SIZES[size].S, SIZES[size].K, seed=9)
    return inputs


class Backend:
    """The ops of one backend."""

    def __init__(self, backend: str):
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return functools.partial(getattr(lk, name), backend=self.backend)


def decode(ops: Backend, i: dict[str, Any]) -> Tensor:
    return ops.sparse_decode(i["indices"], i["values"], i["weight"], i["offsets"])


def head(ops: Backend, i: dict[str, Any], widest: int = softmax_mean.WIDEST) -> Tensor:
    """Average a head's rows; where they are wider than `widest`, by the kernels that write logits."""
    usual, softmax_mean.WIDEST = softmax_mean.WIDEST, widest
    try:
        return ops.softmax_mean(i["hidden"], i["weight"], i["bias"])
    finally:
        softmax_mean.WIDEST = usual


def chunked(ops: Backend, i: dict[str, Any]) -> Tensor:
    """Project on the path of wide layers."""
    inputs = i["x"], i["dy"], i["left"], i["right"]
    return project.project(*inputs, path="chunked") if ops.backend == "triton" else ops.project(*inputs)


def crossed(i: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return two tensors' factors, of other widths."""
    return [i["left"], i["right"]], [i["right"], i["left"]]


@triton.jit
def mirror(out_ptr, held_ptr, value_ptr, N: tl.constexpr):
    """Store values, wait as `coactive_backward` does between its rounds, and load them in the reverse order."""
    offs = tl.arange(0, N)
    tl.store(held_ptr + offs, tl.load(value_ptr + offs))
    tl.debug_barrier()
    tl.store(out_ptr + offs, tl.load(held_ptr + N - 1 - offs))


def mirrored(ops: Backend, i: dict[str, Any]) -> Tensor:
    values = i["c"].flatten()[:512].contiguous()
    if ops.backend == "torch":
        return values.flip(0)
    out, held = torch.empty_like(values), torch.empty_like(values)
    pointers = {"out_ptr": out, "held_ptr": held, "value_ptr": values}
    common.launch(mirror, (1,), Launch({}, warps=4), values.device, **pointers, N=512)
    return out


OTHERS = {
    "mirror": Op(mirrored, head, ()),
    "gram_several": Op(lambda o, i: o.gram(*crossed(i)), head, ("left", "right")),
    "energy_several": Op(
        lambda o, i: o.gram_energy_coactive(kept_of(i), *crossed(i)), head, ("values", "left", "right")
    ),
    "norm_several": Op(lambda o, i: o.squared_gradient_norm([i["x"], i["dy"]], [i["dy"]] * 2), head, ("x", "dy")),
    "sparse_decode": Op(decode, decode, ("values", "weight")),
    "sparse_decode_flat": Op(decode, decode, ("values", "weight")),
    "softmax_mean": Op(head, head, ()),
    "softmax_mean_wide": Op(lambda o, i: head(o, i, 0), head, ()),
    "batch_topk": Op(lambda o, i: o.batch_topk(i["c"], i["n"]).values, head, ("c",)),
    "project_chunked": Op(chunked, chunked, ("x", "dy", "left", "right")),
}


def hold(value: Tensor, twin: Tensor, truth: Tensor, what: str, eps: float) -> None:
    """Hold a result to the truth, which the dtype must be able to represent: else infinities would pass."""
    assert float(truth.abs().max()) < torch.finfo(twin.dtype).max, f"{what}: too large for {twin.dtype}"
    assert_as_good(value, twin, truth, what, eps)


def check(name: str, size: str, kind: str) -> None:
    """Hold an op's value and gradients to the truth, by the tests' rule; `kind` is a dtype or "tf32"."""
    common.PROGRAMS = PROGRAMS.get(size, 264)
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    eps = torch.finfo(torch.float16 if kind == "tf32" else dtype).eps  # tf32 keeps as many bits as float16
    if name == "update":
        return check_update(SIZES[size], dtype, eps, kind)
    inputs = to_dtype(inputs_of(name, size), dtype)
    if name == "project_topk":
        return check_topk(inputs, kind, eps)
    op = OPS.get(name) or OTHERS[name]
    run: Run = lambda i, backend: op.run(Backend(backend), i)  # noqa: E731
    leaves = [leaf for leaf in op.leaves if inputs[leaf].is_floating_point()]
    value, grads = as_tf32(kind, lambda: gradients(run, inputs, leaves, "triton"))
    twin, twin_grads = gradients(run, inputs, leaves, "torch")
    truth, true_grads = gradients(run, to_dtype(inputs, torch.float64), leaves, "torch")
    hold(value, twin, truth, "value", eps)
    for leaf, grad, twin_grad, true_grad in zip(leaves, grads, twin_grads, true_grads, strict=True):
        hold(grad, twin_grad, true_grad, f"gradient of {leaf}", eps)
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
    hold(dense, twin, truth, "coefficients", eps)
    _, grads = as_tf32(kind, lambda: gradients(lambda i, b: select(i, b).values, inputs, leaves, "triton"))
    at: Run = lambda i, b: lk.project_at(*(i[f] for f in factors), kept, backend=b)  # noqa: E731
    (_, twins), (_, truths) = gradients(at, inputs, leaves, "torch"), gradients(at, exact, leaves, "torch")
    for leaf, grad, twin_grad, true_grad in zip(leaves, grads, twins, truths, strict=True):
        hold(grad, twin_grad, true_grad, f"gradient of {leaf}", eps)


def check_update(size: Case, dtype: torch.dtype, eps: float, kind: str) -> None:
    """Hold a step of Adam on matrices and a vector, with its Gram matrices, and the rescaling to the truth."""
    shapes = [(size.K, size.R, size.O), (size.K, size.R, size.I), (size.K, size.O), (size.K, size.R, size.O)]
    drawn = [normal(*shape, seed=10 * i + j, dtype=dtype) for i in range(4) for j, shape in enumerate(shapes)]
    moves = (torch.arange(size.K) % 3 != 1).float()
    grads = [g * moves.to(dtype).view(-1, *[1] * (g.ndim - 1)) for g in drawn[4:8]]
    own_scales = [torch.tensor([0.5]).view(1, *[1] * (len(shape) - 1)) for shape in shapes]

    def step(backend: str, wide: torch.dtype) -> list[torch.Tensor]:
        every = [t.clone() if wide == torch.float32 else t.double() for t in (*drawn[:4], *grads, *drawn[8:])]
        parameters, first = every[:4], every[8:12]
        moments = (every[4:8], first, [v.square() + 0.1 for v in every[12:]])
        vectors = (torch.arange(1.0, size.K + 1).to(wide), moves.to(wide))
        scales = [s.to(wide) for s in own_scales]
        grams = lk.adam_step(parameters, *moments, scales, *vectors, 0.05, grams=3, backend=backend)
        squared = (grams[0] * grams[1]).sum((1, 2)) + grams[2].flatten()
        lk.rescale(parameters[:3], squared, (2, 2, 1), vectors[1], backend=backend)
        return [*parameters, *first, *moments[2], *(gram[moves > 0] for gram in grams)]

    own = as_tf32(kind, lambda: step("triton", torch.float32))
    found = own, step("torch", torch.float32), step("torch", torch.float64)
    for i, (value, twin, truth) in enumerate(zip(*found, strict=True)):
        assert_as_good(value, twin, truth, f"result {i}", eps)
    for before, after in zip(drawn, own[:4], strict=False):
        assert torch.equal(before[moves == 0], after[moves == 0]), "a slice that rests was written"


def as_tf32(kind: str, call: Callable[[], Any]) -> Any:
    """Call with torch's float32 precision "high" where kind is "tf32", else "highest"."""
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        return call()
    finally:
        torch.set_float32_matmul_precision("highest")


def main() -> None:
    """Run the jobs of the command line, OP/SIZE/KIND each; print a JSON list of what each did or raised.

    `--delete`, `--unordered`: see `Launcher`.
    """
    launcher, found = install(), []
    launcher.deleting, launcher.unordered = "--delete" in sys.argv, "--unordered" in sys.argv
    for job in (argument for argument in sys.argv[1:] if argument[:2] != "--"):
        launcher.done.clear()
        launcher.deleted = {}
        began, error = time.process_time(), ""
        try:
            check(*job.split("/"))
        except Exception as exception:
            error = (
                f"{type(exception).__name__}: {exception}"
                if isinstance(exception, AssertionError)
                else traceback.format_exc()
            )
        counts: dict[str, Any] = {"kernels": sorted({own.kernel for own in launcher.done}), "deleted": launcher.deleted}
        counts |= {"instructions": sum(own.instructions for own in launcher.done), "launches": len(launcher.done)}
        found.append({"job": job, "error": error, **counts, "seconds": round(time.process_time() - began, 2)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
