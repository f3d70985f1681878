"""Squared gradient norms, from pairs of positions, from tiles of the gradient and from single rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.energy import squared_gradient_norm

from op_cases import CASES as SHARED
from op_cases import Case, make
from tools import DTYPES, assert_kernel, assert_same_twice, launches, normal, strided

PAIRS = {  # T² (I+O) is less
    "short": Case(B=2, S=6, T=2, I=19, O=33),
    "many tiles": Case(B=2, S=2, T=18, I=60, O=40),
    "indices": SHARED["indices"],
    "indices that repeat": SHARED["indices that repeat"],
    "indices, many tiles": Case(B=2, S=4, T=35, I=9, O=5, indices=True),
}
OUTER = {
    "odd": SHARED["odd"],
    "one sequence": SHARED["one sequence"],
    "many positions": SHARED["many positions"],
    "many tiles of the gradient": Case(B=1, S=2, T=35, I=19, O=33),
}
SINGLE = {
    "one position": Case(B=3, S=6, T=1, I=35, O=17),
    "one position, one sample a sequence": SHARED["one position, one sample a sequence"],
    "indices, one position": SHARED["indices, one position"],
    "single of everything": SHARED["single of everything"],
}
ROUTES = {"norm_pairs": PAIRS, "norm_outer": OUTER, "norm_single": SINGLE}
EVERY = [(kernel, name) for kernel, cases in ROUTES.items() for name in cases]


def run(i: dict[str, Any], backend: str) -> Tensor:
    return lk.squared_gradient_norm(i["x"], i["dy"], backend=backend)


def leaves(inputs: dict[str, Any]) -> tuple[str, ...]:
    return ("x", "dy") if inputs["x"].is_floating_point() else ("dy",)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of few positions, so that small problems need several."""
    monkeypatch.setattr(squared_gradient_norm, "LARGEST_TILE", 16)


@pytest.mark.parametrize("kernel, case", EVERY)
def test_as_the_twin_in_float64(kernel: str, case: str) -> None:
    """Each route has its kernel, value and gradients."""
    inputs = make(ROUTES[kernel][case])
    assert_kernel(run, inputs, leaves(inputs), torch.float64, kernel)


SEVERAL = {  # (T, I, O) or (T, None, O) for indices, and how often each kernel is launched
    "one T": ([(18, 60, 40), (18, 50, 61), (18, 45, 33)], {"norm_pairs": 1}),
    "two Ts, and indices": ([(3, 9, 8), (2, 9, 8), (3, None, 7), (3, 12, 5), (2, None, 4)], {"norm_pairs": 4}),
    "every kernel": (
        [(20, 9, 8), (1, 5, 4), (2, 30, 20), (2, 31, 5)],
        {"norm_pairs": 1, "norm_outer": 1, "norm_single": 1},
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_parameters(case: str) -> None:
    """The sum over parameters, and all gradients; pairs of equal T share a launch, with other sequences for each."""
    sizes, expected = SEVERAL[case]
    inputs: dict[str, Any] = {}
    for i, (T, I, O) in enumerate(sizes):
        B = 6 if i % 2 else 3  # of six samples
        inputs[f"x{i}"] = torch.arange(B * T).view(B, T) % 3 if I is None else normal(B, T, I, seed=2 * i)
        inputs[f"dy{i}"] = normal(6, T, O, seed=2 * i + 1)

    def run_several(i: dict[str, Any], backend: str) -> Tensor:
        lists = ([i[f"{name}{n}"] for n in range(len(sizes))] for name in ("x", "dy"))
        return lk.squared_gradient_norm(*lists, backend=backend)

    names = tuple(name for name, tensor in inputs.items() if tensor.is_floating_point())
    for dtype in DTYPES[:2]:
        assert_kernel(run_several, inputs, names, dtype, *expected)
    assert_kernel(run_several, inputs, ("dy1",), torch.float32, *expected)
    with launches(*expected) as seen:
        together = run_several(inputs, "triton")
    assert seen == expected
    alone = [lk.squared_gradient_norm(inputs[f"x{i}"], inputs[f"dy{i}"]) for i in range(len(sizes))]
    torch.testing.assert_close(together, sum(alone), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    "kernel, case", [("norm_pairs", "short"), ("norm_outer", "odd"), ("norm_single", "one position")]
)
def test_as_good_as_the_twin_in_every_dtype(kernel: str, case: str, dtype: torch.dtype) -> None:
    """In narrow dtypes no error is more than twice the twin's."""
    assert_kernel(run, make(ROUTES[kernel][case]), ("x", "dy"), dtype, kernel)


@pytest.mark.parametrize("case", ["no samples", "no sequences", "indices, no samples"])
def test_no_samples(case: str) -> None:
    """Without samples there is nothing, and no gradient."""
    inputs = make(SHARED[case])
    assert_kernel(run, inputs, leaves(inputs), torch.float32)


@pytest.mark.parametrize("kernel", ROUTES)
def test_strides_gradcheck_and_bits(kernel: str) -> None:
    """Gaps and expansion do not matter, finite differences agree, and two runs give the same bits."""
    case = {"norm_pairs": Case(T=2, I=9, O=8), "norm_outer": SHARED["odd"], "norm_single": Case(T=1)}[kernel]
    inputs = make(case)
    changed = inputs | {"x": strided(inputs["x"]), "dy": inputs["dy"][:1].expand_as(inputs["dy"])}
    assert_kernel(run, changed, ("x", "dy"), torch.float64, kernel)
    own = [inputs[name].clone().requires_grad_() for name in ("x", "dy")]
    torch.autograd.gradcheck(lambda x, dy: run({"x": x, "dy": dy}, "triton"), own, fast_mode=True)
    assert_same_twice(run, make(case, dtype=torch.float32), ("x", "dy"))


def test_compiles_in_one_graph_and_maps_over_a_batch() -> None:
    """torch.compile makes no graph break; vmap of the gradient is the gradient of each."""
    inputs = make(SHARED["odd"])

    def loss(x: Tensor, dy: Tensor) -> Tensor:
        return lk.squared_gradient_norm(x, dy, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs["x"], inputs["dy"]), loss(inputs["x"], inputs["dy"]))
    batch = torch.stack([inputs["x"], 2 * inputs["x"]])
    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(batch, inputs["dy"])
    for x, grad in zip(batch, grads, strict=True):
        assert torch.equal(grad, torch.func.grad(loss)(x, inputs["dy"]))
