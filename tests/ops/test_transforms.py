"""Every public op under torch.func and in forward mode, and differentiated twice, against einsums in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacrev, jvp, vmap

import l3d_kernels as lk
from l3d_kernels import splitting

from helpers import assert_relative
from op_cases import CASES, DEFINED, IN_PLACE, OPS, Case, Inputs, Op, decode_inputs, kept_of, make, true_projection

INDICES, VALUES, WEIGHT = decode_inputs(5, 3, 11, 7)
ENDS = torch.tensor([0, 2, 2, 9, 15])
ONE_HOT = torch.nn.functional.one_hot(INDICES, 11).double()
OWNED = torch.stack([((torch.arange(15) >= a) & (torch.arange(15) < b)).double() for a, b in ENDS.unfold(0, 2, 1)])


def largest(coefficients: Tensor, n: int) -> Tensor:
    """Return the n entries of largest magnitude in row-major order, by a sort; no two are equal."""
    order = coefficients.detach().abs().flatten().argsort(descending=True)[:n]
    return coefficients.flatten()[order.sort().values]


# every public op, as tensors of one dictionary
PUBLIC = {name: OPS[name] for name in DEFINED} | {
    "batch_topk": Op(
        lambda ops, i: ops.batch_topk(i["grad"][:, 0], 4).values, lambda i: largest(i["grad"][:, 0], 4), ("grad",)
    ),
    "batch_topk, groups": Op(
        lambda ops, i: ops.batch_topk(i["grad"][:, :2].flatten(1), 4, 2).values.sort().values,
        lambda i: torch.cat([largest(i["grad"][:, o], 4) for o in (0, 1)]).sort().values,
        ("grad",),
    ),
    "project_topk": Op(
        lambda ops, i: ops.project_topk(i["x"], i["dy"], i["left"], i["right"], 5).values,
        lambda i: largest(true_projection(i), 5),
        ("left", "right"),
    ),
    "sparse_decode": Op(
        lambda ops, i: ops.sparse_decode(INDICES, i["values"], i["weight"]),
        lambda i: torch.einsum("ak,akl,ld->ad", i["values"], ONE_HOT, i["weight"]),
        ("values", "weight"),
    ),
    "sparse_decode, offsets": Op(
        lambda ops, i: ops.sparse_decode(INDICES.flatten(), i["values"].flatten(), i["weight"], ENDS),
        lambda i: torch.einsum("an,n,nl,ld->ad", OWNED, i["values"].flatten(), ONE_HOT.flatten(0, 1), i["weight"]),
        ("values", "weight"),
    ),
    "softmax_mean": Op(
        lambda ops, i: ops.softmax_mean(i["weight"][:4], i["weight"], i["weight"][:, 0]),
        lambda i: (i["weight"][:4] @ i["weight"].mT + i["weight"][:, 0]).softmax(1) @ i["weight"],
        ("weight",),
    ),
}
DECODERS = ("sparse_decode", "sparse_decode, offsets", "softmax_mean")


def inputs_of(name: str, case: str, seed: int = 0) -> Inputs:
    """Draw the inputs of an op; the pairs of kept coefficients are the same for every seed."""
    if name in DECODERS:
        scale = torch.randn(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return {"values": VALUES + scale[0], "weight": WEIGHT * (1 + scale[1])}
    inputs = make(CASES[case], seed)
    return inputs | {key: make(CASES[case])[key] for key in ("pairs", "shape")}


def split(name: str, case: str, seed: int = 0) -> tuple[Inputs, dict[str, Tensor]]:
    """Return the inputs, and those to differentiate by."""
    inputs = inputs_of(name, case, seed)
    return inputs, {key: inputs[key] for key in PUBLIC[name].leaves if inputs[key].is_floating_point()}


def loss(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return a nonlinear function of the leaves."""
    return lambda leaves: run(inputs | leaves).square().sum()


def true_gradients(name: str, inputs: Inputs, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {key: leaf.clone().requires_grad_() for key, leaf in leaves.items()}
    return dict(zip(own, torch.autograd.grad(loss(PUBLIC[name].truth, inputs)(own), list(own.values())), strict=True))


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert_relative(found[key], expected[key], 1e-10)


SIZES = ["odd", "many positions", "one position", "everything kept", "high rank"]
EVERY = [(name, case) for name in PUBLIC for case in (SIZES[:1] if name in DECODERS else SIZES)]
INDEXED = [(name, "indices") for name in ("project", "project_at", "project_topk", "squared_gradient_norm")]


@pytest.fixture(params=[1, 100, splitting.CHUNK])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut temporaries into pieces of one element, of some, or not at all."""
    monkeypatch.setattr(splitting, "CHUNK", request.param)


def test_every_public_op_is_here() -> None:
    """None is left out but those that change tensors in place; those over processes are refused below."""
    assert {name.partition(",")[0] for name in PUBLIC} == set(lk.__all__) - {"SparseCoefficients", *IN_PLACE}


@pytest.mark.parametrize("name, case", EVERY + INDEXED)
@pytest.mark.usefixtures("chunk")
def test_grad_vmap_and_vmap_of_grad(name: str, case: str) -> None:
    """The gradient, a batch of values, and a batch of gradients in both orders, are those of the truth one by one."""
    op, (inputs, leaves) = PUBLIC[name], split(name, case)

    def run(i: Inputs) -> Tensor:
        return op.run(lk, i)

    draws = [split(name, case, seed)[1] for seed in range(3)]
    stacked = {key: torch.stack([draw[key] for draw in draws]) for key in leaves}
    values = vmap(lambda one: run(inputs | one))(stacked)
    assert_relative(values, torch.stack([op.truth(inputs | one) for one in draws]), 1e-12)
    expected = [true_gradients(name, inputs, one) for one in draws]
    together = {key: torch.stack([one[key] for one in expected]) for key in leaves}
    assert_alike(grad(loss(run, inputs))(draws[0]), expected[0])
    assert_alike(vmap(grad(loss(run, inputs)))(stacked), together)
    assert_alike(grad(lambda every: vmap(loss(run, inputs))(every).sum())(stacked), together)


@pytest.mark.parametrize("name, case", EVERY + INDEXED)
@pytest.mark.usefixtures("chunk")
def test_forward_mode(name: str, case: str) -> None:
    """jvp, a dual level of torch.autograd, and vmap of jvp move the value as finite differences of the truth do."""
    op, (inputs, leaves) = PUBLIC[name], split(name, case)
    tangents = {key: torch.cos(7 * leaf) for key, leaf in leaves.items()}
    step = 1e-5
    ahead, behind = (
        op.truth(inputs | {key: leaf + s * tangents[key] for key, leaf in leaves.items()}) for s in (step, -step)
    )
    slope = (ahead - behind) / (2 * step)
    value, moved = jvp(lambda one: op.run(lk, inputs | one), (leaves,), (tangents,))
    assert_relative(value, op.truth(inputs), 1e-12)
    assert_relative(moved, slope, 1e-6)
    with forward_ad.dual_level():
        dual = {key: forward_ad.make_dual(leaf, tangents[key]) for key, leaf in leaves.items()}
        assert_relative(forward_ad.unpack_dual(op.run(lk, inputs | dual)).tangent, slope, 1e-6)
    both = {key: torch.stack([tangent, 2 * tangent]) for key, tangent in tangents.items()}
    _, batch = vmap(lambda t: jvp(lambda one: op.run(lk, inputs | one), (leaves,), (t,)))(both)
    assert_relative(batch, torch.stack([slope, 2 * slope]), 1e-6)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "softmax_mean"])
@pytest.mark.usefixtures("chunk")
def test_hessians(name: str) -> None:
    """Forward over reverse, and reverse over reverse, give the truth's second derivatives."""
    inputs, leaves = split(name, "odd")
    key = PUBLIC[name].leaves[-1]
    shown = {key: leaves[key][:1]}

    def function(run: Callable[[Inputs], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda part: run(inputs | {key: torch.cat([part, leaves[key][1:]])}).square().sum()

    expected = torch.autograd.functional.hessian(function(PUBLIC[name].truth), shown[key])
    own = function(lambda i: PUBLIC[name].run(lk, i))
    assert_relative(hessian(own)(shown[key]), expected, 1e-10)
    assert_relative(jacrev(jacrev(own))(shown[key]), expected, 1e-10)


def test_codes_that_are_batched_themselves() -> None:
    """Each batch keeps pairs of its own: vmap and vmap of grad through the selection equal a loop over the truth."""
    inputs = make(Case())
    batch = torch.stack([make(Case(), seed)["dy"] for seed in range(3)])

    def energy(ops: Any, dy: Tensor, left: Tensor) -> Tensor:
        kept = ops.batch_topk(ops.project(inputs["x"], dy, left, inputs["right"]), 7)
        assert kept.row_offsets.shape == (7,)
        residual = ops.squared_residual_norm(kept, left, inputs["right"], inputs["grad"])
        return (ops.gram_energy(kept, left, inputs["right"]) + residual + kept.threshold).sum()

    def truth(dy: Tensor, left: Tensor) -> Tensor:
        c = true_projection(inputs | {"dy": dy, "left": left})
        threshold = c.abs().flatten().sort(descending=True).values[6]
        ghat = torch.einsum("sk,kro,kri->soi", torch.where(c.abs() >= threshold.detach(), c, 0), left, inputs["right"])
        return (ghat.square() + (inputs["grad"] - ghat).square()).sum() + 6 * threshold.detach()

    left = inputs["left"].requires_grad_()
    own = vmap(grad(lambda dy, left: energy(lk, dy, left), argnums=(0, 1)), in_dims=(0, None))(batch, left.detach())
    assert_relative(vmap(lambda dy: energy(lk, dy, left))(batch), torch.stack([truth(dy, left) for dy in batch]), 1e-12)
    for i, dy in enumerate(batch.requires_grad_()):
        for found, expected in zip(own, torch.autograd.grad(truth(dy, left), (dy, left)), strict=True):
            assert_relative(found[i], expected, 1e-10)


@pytest.mark.parametrize("transform", [vmap, grad, lambda f: lambda c: jvp(f, (c,), (c,))], ids=["vmap", "grad", "jvp"])
@pytest.mark.parametrize("over", ["ranks", "columns"])
def test_selection_over_processes_is_refused(transform: Any, over: str) -> None:
    """One line that names the op, before anything is sent."""
    from l3d_kernels import ops

    def select(c: Tensor) -> Tensor:
        if over == "ranks":
            return ops.batch_topk_over_ranks(c, 2, pytest.fail, pytest.fail).values.sum()
        return ops.batch_topk_over_columns(c, 2, 0, pytest.fail).values.sum()

    sizes = (2, 3, 4) if transform is vmap else (3, 4)
    with pytest.raises(RuntimeError, match=rf"^batch_topk_over_{over}: cannot run under torch.func .*$"):
        transform(select)(torch.randn(*sizes))


# --- second derivatives -----------------------------------------------------------------------------------------


def penalised(run: Callable[[Inputs], Tensor], inputs: Inputs, own: dict[str, Tensor]) -> list[Tensor]:
    """Return the gradients of Σ value + ‖its gradient‖², the upstream gradient of the value being a constant."""
    leaves = list(own.values())
    value = run(inputs | own).sum()
    slopes = torch.autograd.grad(value, leaves, create_graph=True)
    return list(torch.autograd.grad(value + sum(slope.square().sum() for slope in slopes), leaves))


OPS_TWICE = {name: op for name, op in (OPS | PUBLIC).items() if name not in (*DECODERS, "outer", "dense")}


@pytest.mark.parametrize("case", ["odd", "many positions", "everything kept", "many subnetworks, few kept"])
@pytest.mark.parametrize("name", OPS_TWICE)
@pytest.mark.usefixtures("chunk")
def test_gradients_of_gradients_are_the_truths(name: str, case: str) -> None:
    """Whatever path an op takes, of all its leaves and of each alone: nothing is dropped under a constant upstream."""
    op, inputs = OPS_TWICE[name], make(CASES[case])
    for chosen in (op.leaves, *((leaf,) for leaf in op.leaves)):
        found, expected = (
            penalised(run, inputs, {key: inputs[key].clone().requires_grad_() for key in chosen})
            for run in (lambda i: op.run(lk, i), op.truth)
        )
        for own, true in zip(found, expected, strict=True):
            assert_relative(own, true, 1e-9)


@pytest.mark.parametrize("name", DECODERS[:2])
@pytest.mark.parametrize("leaves", [("values", "weight"), ("values",), ("weight",)], ids=str)
def test_decoding_differentiated_twice_raises_or_is_right(name: str, leaves: tuple[str, ...]) -> None:
    """torch's embedding_bag is differentiable once; where it is linear in the one leaf nothing more is asked of it."""
    inputs = inputs_of(name, "odd")
    own = {key: inputs[key].clone().requires_grad_() for key in leaves}
    run = loss(lambda i: PUBLIC[name].run(lk, i), inputs)
    slopes = torch.autograd.grad(run(own), list(own.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        torch.autograd.grad(slopes[0].sum(), list(own.values()))


@pytest.mark.usefixtures("chunk")
def test_residuals_of_zero_curve_too() -> None:
    """A sample whose residual is zero has the second derivative 2 as any other, not NaN."""
    inputs = make(CASES["nothing kept"])
    inputs["grad"][0], inputs["grad"][1, 2:] = 0, 0
    rows = inputs["grad"].requires_grad_()
    value = lk.squared_residual_norm(kept_of(inputs), inputs["left"], inputs["right"], rows)
    (slope,) = torch.autograd.grad(value.sum(), rows, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), rows)
    assert torch.equal(curvature, torch.full_like(rows, 2))


@pytest.mark.parametrize("name", OPS_TWICE)
@pytest.mark.usefixtures("chunk")
def test_batched_upstream_gradients(name: str) -> None:
    """is_grads_batched gives the gradients of each upstream gradient."""
    op, inputs = OPS_TWICE[name], make(CASES["odd"])
    own = {key: inputs[key].clone().requires_grad_() for key in op.leaves}
    value, true = op.run(lk, inputs | own), op.truth(inputs | own)
    upstream = torch.randn(3, *value.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad(value, list(own.values()), upstream, is_grads_batched=True, retain_graph=True)
    for i, each in enumerate(upstream):
        expected = torch.autograd.grad(true, list(own.values()), each, retain_graph=True)
        for one, grad_of_true in zip(found, expected, strict=True):
            assert_relative(one[i], grad_of_true, 1e-10)


@pytest.mark.parametrize("tensor", ["hidden", "weight", "bias"])
def test_softmax_mean_drops_no_derivative(tensor: str) -> None:
    """A tensor that needs a gradient is refused by name; under no_grad it is taken."""
    inputs = {"hidden": WEIGHT[:4].clone(), "weight": WEIGHT.clone(), "bias": WEIGHT[:, 0].clone()}
    inputs[tensor].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{tensor}: softmax_mean is not differentiable; detach it$"):
        lk.softmax_mean(**inputs)
    with torch.no_grad():
        assert not lk.softmax_mean(**inputs).requires_grad
