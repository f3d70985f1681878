"""The update in two kernels: Adam's step with Gram matrices of the new decoder, then its rescaling to unit norm."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import l3d_kernels as lk
from l3d.decomposition.directions import Directions
from l3d.training.optimizer import RelativeAdam, update
from l3d_kernels import reference
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared.launch_table import TABLE, Launch
from l3d_kernels.kernels.update import adam
from l3d_kernels.splitting import as_rows

from tools import DTYPES, assert_as_good, launches, normal

K = 5
SHAPES = {  # of one tensor's slices: several blocks of the interpreter's, odd sizes, ranks beyond 16 and 64
    "matrix": (3, 37),
    "rank one": (1, 50),
    "rank 17": (17, 33),
    "rank beyond a tile": (70, 5),
    "vector": (35,),
    "core": (2, 3, 4),
    "scalar": (1,),
}
MOVES = torch.tensor([1.0, 0, 1, 1, 0])
KERNELS = ("adam_gram", "rescale_slices")


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Draw the arguments of a step: slices that rest have moments and no gradient."""
    wide = torch.promote_types(dtype, torch.float32)
    every = [(K, *shape) for shape in shapes]

    def draw(first_seed: int) -> list[Tensor]:
        return [normal(*shape, seed=seed + first_seed + i, dtype=dtype) for i, shape in enumerate(every)]

    moves = MOVES.to(wide)
    return {
        "parameters": draw(0),
        "grads": [grad * moves.to(dtype).view(-1, *[1] * (grad.ndim - 1)) for grad in draw(100)],
        "first": draw(200),
        "second": [each.square() for each in draw(300)],
        "scales": [
            normal(*((K if i % 2 else 1), *[1] * len(shape)), seed=seed + 400 + i, dtype=wide).abs()
            for i, shape in enumerate(shapes)
        ],
        "counts": torch.tensor([1, 0, 7, 300, 2]).to(wide),
        "moves": moves,
    }


WRITTEN = ("parameters", "first", "second")


def step(made: dict[str, Any], run: Any, **options: Any) -> dict[str, list[Tensor]]:
    """Take the step on copies; return what was written, and the Gram matrices of the slices that move."""
    own = {key: [t.clone() for t in made[key]] if isinstance(made[key], list) else made[key] for key in made}
    grams = run(**own, lr=0.05, grams=len(own["grads"]), **options)
    return {key: own[key] for key in WRITTEN} | {"grams": [gram[MOVES > 0] for gram in grams]}


def assert_step(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    made = make(shapes, dtype)
    with launches(
        *{"adam_slices" if shape[0] > adam.MOST_RANKS else "adam_gram" for shape in shapes if len(shape) > 1}
    ):
        own = step(made, lk.adam_step, backend="triton")
    twin = step(made, lk.adam_step, backend="torch")
    as_double = {k: [t.double() for t in v] if isinstance(v, list) else v.double() for k, v in made.items()}
    truth = step(as_double, reference.adam_step)
    for key, tensors in own.items():
        for kernel, plain, true in zip(tensors, twin[key], truth[key], strict=True):
            assert_as_good(kernel, plain, true, key)
    for key in WRITTEN:
        for before, after in zip(made[key], own[key], strict=True):
            assert torch.equal(before[MOVES == 0], after[MOVES == 0]), f"{key}: slices that rest were written"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_in_float64(shape: str) -> None:
    """Parameters, moments and Gram matrices are the definition's; resting slices keep their bits."""
    assert_step([SHAPES[shape]], torch.float64)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_step_in_every_dtype(dtype: torch.dtype) -> None:
    """All tensors at once: no error is more than twice the twin's."""
    assert_step(list(SHAPES.values()), dtype)


def test_one_step_within_a_millionth_of_the_twin() -> None:
    """From the same state in float32 every entry is within 1e-6 of the tensor's largest."""
    made = make(list(SHAPES.values()), torch.float32)
    own, twin = (step(made, lk.adam_step, backend=backend) for backend in ("triton", "torch"))
    for key, tensors in twin.items():
        for a, b in zip(own[key], tensors, strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max(), key


def test_shares_of_a_slice_and_same_bits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice cut among programs has the same parameters and, to rounding, Gram matrices; two runs are alike."""
    made = make([(3, 100), (2, 17)], torch.float32)
    whole = step(made, lk.adam_step, backend="triton")
    monkeypatch.setattr(adam, "LEAST_SHARE", 32)
    once, twice = (step(made, lk.adam_step, backend="triton") for _ in range(2))
    for key in once:
        for a, b, c in zip(once[key], twice[key], whole[key], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c) or (key == "grams" and not (a - c).abs().max() > 1e-6 * c.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rescaling(dtype: torch.dtype) -> None:
    """Each tensor takes its share of the factor; a slice that rests, or of norm zero, does no harm."""
    made = make([(3, 37), (3, 20), (35,)], dtype)
    squared = torch.tensor([4.0, torch.nan, 0.0, 1e-3, torch.inf]).to(made["moves"])
    results = {}
    for backend in ("triton", "torch"):
        results[backend] = [p.clone() for p in made["parameters"]]
        lk.rescale(results[backend], squared, [2, 2, 1], made["moves"], backend=backend)
    own = torch.tensor([0, 3])
    truth = [p.double() for p in made["parameters"]]
    reference.rescale([p[own] for p in truth], squared[own].double(), [2, 2, 1])
    for p, n, kernel, twin in zip(made["parameters"], (2, 2, 1), results["triton"], results["torch"], strict=True):
        true = p[own].double() * (squared[own].double() ** (-0.5 / n)).view(-1, *[1] * (p.ndim - 1))
        assert_as_good(kernel[own], twin[own], true)
        assert torch.equal(kernel[MOVES == 0], p[MOVES == 0])
        assert torch.equal(kernel[2].isfinite(), twin[2].isfinite())


# --- a decomposition's update ------------------------------------------------------------------------------------

TENSORS = {"matrix": (torch.Size([9, 7]), (2,)), "bias": (torch.Size([9]), ())}
KERNEL = {"kernel": (torch.Size([4, 3, 2, 2]), (2, 2, 2, 1))}


def sides(tensors: dict[str, Any], n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Directions, ...]:
    shapes, ranks = ({name: held[i] for name, held in tensors.items()} for i in (0, 1))
    generator = torch.Generator().manual_seed(seed)
    return tuple(Directions(shapes, ranks, n, generator).to(dtype) for _ in range(2))


def recorded(like: list[Tensor], step: int) -> tuple[list[Tensor], Tensor]:
    """Return a step's gradients, of sizes that change, and which slices have one."""
    generator = torch.Generator().manual_seed(step)
    n = len(like[0])
    rows = torch.randint(n, (n // 2 + 1,), generator=generator)
    rests = torch.ones(n, dtype=torch.bool).index_fill_(0, rows, False)
    grads = [torch.randn(p.shape, generator=generator).to(p.dtype) * 10.0 ** (step % 5 - 3) for p in like]
    return [grad.masked_fill(rests.view(-1, *[1] * (grad.ndim - 1)), 0) for grad in grads], rows


def test_two_hundred_steps() -> None:
    """With subnetworks that rest, are revived and replaced, both ways end within 1e-5 of a tensor's largest entry.

    At every step a slice that rests keeps its bits, and all decoder directions have unit norm.
    """
    runs = {backend: sides(TENSORS, 3) for backend in ("triton", "torch")}
    adams = {backend: RelativeAdam([*d.parameters(), *e.parameters()], lazy=True) for backend, (d, e) in runs.items()}
    rested = 0
    for number in range(200):
        grads, rows = recorded(adams["torch"].parameters, number)
        before = [p.detach().clone() for p in adams["triton"].parameters]
        with launches(*KERNELS):
            update(adams["triton"], runs["triton"][0], grads, 0.05 * 0.99**number, rows, "triton")
        update(adams["torch"], runs["torch"][0], grads, 0.05 * 0.99**number, rows, "torch")
        rests = torch.ones(3, dtype=torch.bool).index_fill_(0, rows, False)
        rested += int(rests.sum())
        for old, new in zip(before, adams["triton"].parameters, strict=True):
            assert torch.equal(old[rests], new[rests])
        if number % 60 == 40:  # revived in one place, replaced in another: encoder and decoder alike, moments forgotten
            new_directions, changed = sides(TENSORS, 2, seed=number)[0], torch.tensor([number % 3, (number + 1) % 3])
            for backend, both in runs.items():
                for side in both:
                    for p, new in zip(side.parameters(), new_directions.parameters(), strict=True):
                        with torch.no_grad():
                            p[changed] = new
                adams[backend].forget(changed)
        norms = runs["triton"][0].squared_norm()
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-5)
    assert rested > 100
    assert torch.equal(adams["triton"].counts, adams["torch"].counts)
    for kind in ("parameters", "first", "second"):
        for own, twin in zip(getattr(adams["triton"], kind), getattr(adams["torch"], kind), strict=True):
            assert (own - twin).abs().max() <= 1e-5 * twin.abs().max(), kind


@pytest.mark.parametrize("lazy", [False, True])
def test_every_kind_of_tensor(lazy: bool) -> None:
    """Vectors, matrices and Tucker products in float64, with restarts side by side: three steps as the plain path's."""
    runs = {backend: sides(TENSORS | KERNEL, 4, dtype=torch.float64) for backend in ("triton", "torch")}
    adams = {b: RelativeAdam([*e.parameters(), *d.parameters()], True, 2, lazy) for b, (d, e) in runs.items()}
    for number in range(3):
        grads, rows = recorded(adams["torch"].parameters, number)
        for backend, adam_ in adams.items():
            update(adam_, runs[backend][0], grads, 0.05, rows if lazy else None, backend)
    for own, twin in zip(adams["triton"].parameters, adams["torch"].parameters, strict=True):
        torch.testing.assert_close(own, twin, rtol=1e-7, atol=1e-7)  # the start, in float32, has norm one to 1e-7


def test_norms_from_gram_matrices_add_up_over_shards() -> None:
    """The sum over shards that hold some tensors each is the norm of all together."""
    decoder, _ = sides(TENSORS | KERNEL, 3, dtype=torch.float64)
    parts = []
    for own in ({"matrix": TENSORS["matrix"]}, {"bias": TENSORS["bias"]}, KERNEL):
        shard = sides(own, 3)[0].double()
        for name, piece in shard.items():
            piece.load_state_dict(dict(decoder.items())[name].state_dict())
        rows = [as_rows(p) for p in shard.parameters()]
        parts.append(shard.squared_norm_of([each @ each.mT for each in rows]))
    torch.testing.assert_close(sum(parts), decoder.squared_norm(), rtol=1e-12, atol=0)


# --- memory ------------------------------------------------------------------------------------------------------


class Bytes(TorchDispatchMode):
    """Count the bytes that torch's operations read and write, and inside our operators those of the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.names: Counter[str] = Counter()  # of what was counted, and of our operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views and "empty" not in func.__name__:
            self.names[func._schema.name] += 1
        if (
            func.namespace == "l3d" and not args[0][0].is_meta
        ):  # count inside: the launch function itself, which is no operator
            with self:
                return common.OPERATORS[func._opname](*args)
        out = func(*args, **(kwargs or {}))
        if not views and "empty" not in func.__name__:
            found = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in found)
        return out


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bytes]:
    """Count what torch moves, and every element that the interpreter loads or stores."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen = Bytes()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def moved(pointers: Any, mask: Any) -> None:
        seen.total += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        moved(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def uncounted_launch(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():  # the interpreter copies arguments by torch
            launch(*args, **kwargs)

    launch = common.launch
    with monkeypatch.context() as patch:
        patch.setattr(common, "launch", uncounted_launch)
        patch.setattr(common, "POISON", False)
        for name in (*KERNELS, "adam_slices"):  # large blocks, so that large tensors take little time
            patch.setitem(TABLE[name], ("interpreter", None), Launch({"BLOCK": 1 << 16}))
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        with seen:
            yield seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("moving", [1, 3])
def test_the_update_is_eight_passes_over_what_moves(
    moving: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven numbers for each parameter that moves, and a reading and a writing of the decoder's: half of them."""
    tensors = {f"{i}": (torch.Size([7000, 9000]), (2,)) for i in range(2)}
    decoder, encoder = sides(tensors, 3, dtype=dtype)
    optimizer = RelativeAdam([*decoder.parameters(), *encoder.parameters()], lazy=True)
    rows = torch.arange(moving)
    grads = [torch.zeros_like(p).index_fill_(0, rows, 1) for p in optimizer.parameters]
    with counted(monkeypatch) as seen:
        update(optimizer, decoder, grads, 0.01, rows, "triton")
    one_pass = sum(p[rows].numel() * p.element_size() for p in optimizer.parameters)
    print(f"{seen.total / one_pass:.3f} passes, {moving} of 3 slices moving, {dtype}")
    assert 7.99 < seen.total / one_pass < 8.05  # what is beyond 8 has the size of K, or of R²


def test_the_update_does_not_wait_and_takes_few_launches() -> None:
    """On tensors without numbers, of a block's four matrices: 15 small operations of torch beside the two operators."""
    with torch.device("meta"):
        shapes = {name: torch.Size([256, 256]) for name in "qkvo"}
        decoder, encoder = (Directions(shapes, dict.fromkeys(shapes, (25,)), 100) for _ in range(2))
    optimizer = RelativeAdam([*encoder.parameters(), *decoder.parameters()], lazy=True)
    grads = [torch.empty_like(p) for p in optimizer.parameters]
    with Bytes() as seen:
        update(optimizer, decoder, grads, 0.1, torch.empty(99, dtype=torch.int64, device="meta"))
    ours = {name: n for name, n in seen.names.items() if name.startswith("l3d")}
    assert ours == {"l3d::adam_step": 1, "l3d::rescale": 1}
    assert seen.names.total() <= 2 + 15, seen.names
    assert not set(seen.names) & {"aten::_local_scalar_dense", "aten::_to_copy", "aten::copy_", "aten::nonzero"}
