"""`project_topk`: the histogram counted in project's epilogue leads to the selection that a pass of its own would."""

from typing import Any

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.project import project
from l3d_kernels.kernels.topk import batch_topk, radix

from op_cases import Case
from project_cases import CASES, make
from tools import DTYPES, assert_as_good, assert_same_twice, gradients, launches, normal, strided, to_dtype

LEAVES = ("left", "right")
NAMES = ("shared", "one sample a sequence", "several tiles", "one position, rank one", "indices")


def inputs_of(case: Case, kept: float = 0.4, based: bool = True) -> dict[str, Any]:
    base = normal(case.S, case.K, seed=9) if based else None
    return make(case) | {"base": base, "n": round(kept * case.S * case.K)}


def select(i: dict[str, Any], backend: str) -> lk.SparseCoefficients:
    return lk.project_topk(i["x"], i["dy"], i["left"], i["right"], i["n"], i["base"], backend=backend)


def run(i: dict[str, Any], backend: str) -> Tensor:
    return select(i, backend).values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_histogram_is_that_of_what_is_stored(name: str, dtype: torch.dtype) -> None:
    """The epilogue's counts are those of a pass over the stored coefficients, to the last one."""
    i = to_dtype(inputs_of(CASES[name]), dtype)
    histogram = radix.first_histogram(dtype, torch.device("cpu"))
    dense = project.coefficients(i["x"], i["dy"], i["left"], i["right"], i["base"], histogram)
    expected, _ = radix.digit_histogram(dense, 0, radix.begin(1, dense.device))
    assert torch.equal(histogram, expected)
    assert histogram.sum() == dense.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_selection_and_gradients(name: str, dtype: torch.dtype) -> None:
    """What is kept is what batch_topk keeps of the same coefficients; gradients are those at the kept pairs."""
    i = to_dtype(inputs_of(CASES[name], based=name != "indices"), dtype)
    with launches("topk_histogram", "topk_write") as seen:
        kept = select(i, "triton")
    assert seen["project_pair"] + seen["project_seen"] == 1
    assert seen["topk_histogram"] == len(radix.DIGITS[dtype.itemsize]) - 1, "the first digit was counted again"
    dense = project.coefficients(i["x"], i["dy"], i["left"], i["right"], i["base"], None)
    expected = batch_topk.batch_topk(dense, i["n"])
    for own, other in zip(kept[:-1], expected[:-1], strict=True):
        assert torch.equal(own, other)
    assert kept.shape == expected.shape

    at = lambda j, backend: lk.project_at(j["x"], j["dy"], j["left"], j["right"], kept, backend=backend)  # noqa: E731
    _, grads = gradients(run, i, LEAVES, "triton")
    _, twins = gradients(at, i, LEAVES, "torch")
    _, truths = gradients(at, to_dtype(i, torch.float64), LEAVES, "torch")
    for grad, twin, truth in zip(grads, twins, truths, strict=True):
        assert_as_good(grad, twin, truth)


@pytest.mark.parametrize("name", ["shared", "indices"])
def test_it_agrees_with_the_twin(name: str) -> None:
    """In float64 the twin keeps the same pairs, with the same values and gradients."""
    i = inputs_of(CASES[name])
    own, twin = select(i, "triton"), select(i, "torch")
    assert torch.equal(own.rows, twin.rows)
    assert torch.equal(own.columns, twin.columns)
    _, grads = gradients(run, i, LEAVES, "triton")
    _, twin_grads = gradients(run, i, LEAVES, "torch")
    for a, b in zip([own.values, *grads], [twin.values, *twin_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradcheck_and_strides() -> None:
    """Gradients agree with differences in float64, which are too small to change what is kept; gaps change nothing."""
    i = inputs_of(CASES["shared"])
    gaps = i | {name: strided(i[name]) for name in ("x", "dy", "left", "right", "base")}
    assert torch.equal(run(gaps, "triton"), run(i, "triton"))
    free = [i[name].requires_grad_() for name in LEAVES]
    torch.autograd.gradcheck(
        lambda left, right: run(i | {"left": left, "right": right}, "triton"), free, fast_mode=True
    )


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_nothing_and_everything_kept(kept: float) -> None:
    """n = 0 keeps nothing, n = S*K every entry."""
    i = inputs_of(CASES["shared"], kept)
    value, grads = gradients(run, i, LEAVES, "triton")
    assert len(value) == i["n"]
    assert bool(grads[0].any()) == bool(kept)
    assert_same_twice(run, i, LEAVES)
    assert len(run(inputs_of(Case(S=0)), "triton")) == 0


def test_bindings() -> None:
    """The operator keeps torch's contract, and torch.compile(fullgraph=True) traces it."""
    i = inputs_of(CASES["shared"])
    arguments = (i["x"], i["dy"], i["left"], i["right"], i["n"], i["base"])
    torch.library.opcheck(torch.ops.l3d.project_topk, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda i: run(i, "triton"), fullgraph=True, backend="aot_eager")
    value, grads = gradients(lambda i, _: compiled(i), i, LEAVES, "triton")
    plain, plain_grads = gradients(run, i, LEAVES, "triton")
    assert all(torch.equal(a, b) for a, b in zip([value, *grads], [plain, *plain_grads], strict=True))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"n": 25}, r"n: expected 0 <= n <= S\*K = 24, got 25"),
        ({"base": normal(6, 5)}, r"base: expected shape \[6, 4\] and torch.float64, got \[6, 5\]"),
        ({"dy": normal(6, 3, 7).requires_grad_()}, "x, dy, base: project_topk has no gradient to them"),
    ],
)
def test_refusals(changed: dict[str, Any], message: str) -> None:
    """A wrong size, or a gradient that would be missing, is refused by either backend."""
    for backend in ("torch", "triton"):
        with pytest.raises(ValueError, match=message):
            select(inputs_of(CASES["shared"]) | changed, backend)
