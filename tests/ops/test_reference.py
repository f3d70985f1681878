"""Every operation in plain torch against a float64 truth that materialises V and G and shares no code with it."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels import dispatch, reference

from helpers import assert_relative

VALUES, GRADIENTS = 1e-12, 1e-10


class Case(NamedTuple):
    """Sizes of one problem; `kept` is how many coefficients are kept, `lopsided` keeps them in few subnetworks."""

    B: int = 2
    S: int = 6
    T: int = 3
    I: int = 5
    O: int = 7
    K: int = 4
    R: int = 2
    kept: int = 9
    indices: bool = False
    lopsided: bool = False


CASES = {
    "odd": Case(),
    "one sample a sequence": Case(B=5, S=5, kept=7),
    "one sequence": Case(B=1, S=3, kept=5),
    "one position": Case(T=1),
    "one position, one sample a sequence": Case(B=6, T=1),
    "many positions": Case(T=17, I=3, O=2),
    "rank one": Case(R=1),
    "one subnetwork": Case(K=1, kept=3),
    "many subnetworks, few kept": Case(K=23, kept=6),
    "high rank": Case(R=5, O=5),
    "rank beyond full": Case(R=9, I=3, O=2),
    "no samples": Case(S=0, kept=0),
    "no sequences": Case(B=0, S=0, kept=0),
    "no samples, many positions": Case(S=0, T=17, I=3, O=2, kept=0),
    "no samples, one position": Case(S=0, T=1, kept=0),
    "nothing kept": Case(kept=0),
    "one kept": Case(kept=1),
    "everything kept": Case(kept=24),
    "lopsided": Case(B=10, S=20, K=6, kept=37, lopsided=True),
    "indices": Case(indices=True),
    "indices, one position": Case(T=1, indices=True),
    "indices that repeat": Case(I=2, T=6, indices=True),
    "indices, many kept": Case(B=1, S=6, kept=20, indices=True),
    "indices, few kept": Case(B=6, S=6, K=9, kept=4, indices=True),
    "indices, no samples": Case(S=0, kept=0, indices=True),
    "single of everything": Case(B=1, S=1, T=1, I=1, O=1, K=1, R=1, kept=1),
}
FLOATS = ("x", "dy", "left", "right", "grad", "values")
Inputs = dict[str, Any]


def make(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """Draw the inputs of a case; the kept coefficients are their own draw, with the pairs in `pairs`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x: Tensor = normal(case.B, case.T, case.I)
    if case.indices:
        x = torch.randint(case.I, (case.B, case.T), generator=generator)
    scores = torch.rand(case.S, case.K, generator=generator) + 0.1
    if case.lopsided:  # one subnetwork in every sample, others once or never
        scores[:, 0] += 9
        scores[:, 1] += torch.arange(case.S) < case.S // 2
        scores[:, 3:] *= 0
        scores[0, 3:] += 5
    flat = scores.flatten().argsort(descending=True)[: case.kept].sort().values
    return {
        "x": x,
        "dy": normal(case.S, case.T, case.O),
        "left": normal(case.K, case.R, case.O),
        "right": normal(case.K, case.R, case.I),
        "grad": normal(case.S, case.O, case.I),
        "values": normal(case.kept),
        "pairs": torch.stack([flat // case.K, flat % case.K]),
        "shape": (case.S, case.K),
    }


def kept_of(inputs: Inputs) -> lk.SparseCoefficients:
    """Index the kept pairs by looping over them, as the documentation of `SparseCoefficients` says."""
    (S, K), (rows, columns) = inputs["shape"], inputs["pairs"]
    by_column = [[i for i, c in enumerate(columns.tolist()) if c == k] for k in range(K)]
    return lk.SparseCoefficients(
        values=inputs["values"],
        rows=rows,
        columns=columns,
        row_offsets=torch.tensor([sum(r < s for r in rows.tolist()) for s in range(S + 1)]),
        column_order=torch.tensor([i for entries in by_column for i in entries], dtype=torch.int64),
        column_offsets=torch.tensor([sum(len(e) for e in by_column[:k]) for k in range(K + 1)]),
        threshold=torch.tensor(float("nan")),
        shape=(S, K),
    )


# --- the truth: V and G in full, one einsum each ----------------------------------------------------------------


def true_gradient(i: Inputs) -> Tensor:
    """G [S, O, I]."""
    x, dy = i["x"], i["dy"]
    if not x.is_floating_point():
        x = torch.nn.functional.one_hot(x.long(), i["right"].shape[2]).to(dy)
    share = len(dy) // len(x) if len(x) else 1
    return torch.einsum("sti,sto->soi", torch.stack([x[s // share] for s in range(len(dy))]) if len(dy) else x[:0], dy)


def true_directions(i: Inputs) -> Tensor:
    """V [K, O, I]."""
    return torch.einsum("kro,kri->koi", i["left"], i["right"])


def true_coefficients(i: Inputs) -> Tensor:
    """The kept coefficients [S, K], zeros elsewhere."""
    dense = i["left"].new_zeros(i["shape"])
    rows, columns = i["pairs"]
    return dense.index_put((rows, columns), i["values"])


def true_projection(i: Inputs) -> Tensor:
    return torch.einsum("soi,koi->sk", true_gradient(i), true_directions(i))


def true_reconstruction(i: Inputs) -> Tensor:
    return torch.einsum("sk,koi->soi", true_coefficients(i), true_directions(i))


class Op(NamedTuple):
    """An operation, its truth, and the inputs that carry gradients."""

    run: Callable[[Inputs], Tensor]
    truth: Callable[[Inputs], Tensor]
    leaves: tuple[str, ...]


OPS = {
    "project": Op(
        lambda i: lk.project(i["x"], i["dy"], i["left"], i["right"]),
        true_projection,
        ("x", "dy", "left", "right"),
    ),
    "project_tiled": Op(
        lambda i: lk.project_tiled(i["x"], i["dy"], i["left"], i["right"]),
        true_projection,
        ("left", "right"),
    ),
    "project_at": Op(
        lambda i: lk.project_at(i["x"], i["dy"], i["left"], i["right"], kept_of(i)),
        lambda i: true_projection(i)[i["pairs"][0], i["pairs"][1]],
        ("left", "right"),
    ),
    "project_dense": Op(
        lambda i: lk.project_dense(i["grad"], i["left"], i["right"]),
        lambda i: torch.einsum("soi,koi->sk", i["grad"], true_directions(i)),
        ("grad", "left", "right"),
    ),
    "gram": Op(
        lambda i: lk.gram(i["left"], i["right"]),
        lambda i: torch.einsum("koi,joi->kj", true_directions(i), true_directions(i)),
        ("left", "right"),
    ),
    "gram_by_factors": Op(
        lambda i: reference.gram_by_factors(i["left"], i["right"]),
        lambda i: torch.einsum("koi,joi->kj", true_directions(i), true_directions(i)),
        ("left", "right"),
    ),
    "gram_by_tiles": Op(
        lambda i: reference.gram_by_tiles(i["left"], i["right"]),
        lambda i: torch.einsum("koi,joi->kj", true_directions(i), true_directions(i)),
        ("left", "right"),
    ),
    "gram_energy": Op(
        lambda i: lk.gram_energy(kept_of(i), i["left"], i["right"]),
        lambda i: true_reconstruction(i).square().sum((1, 2)),
        ("values", "left", "right"),
    ),
    "gram_energy_coactive": Op(
        lambda i: lk.gram_energy_coactive(kept_of(i), i["left"], i["right"]),
        lambda i: true_reconstruction(i).square().sum((1, 2)),
        ("values", "left", "right"),
    ),
    "energy_by_tiles": Op(
        lambda i: reference.energy_by_tiles(kept_of(i).dense(), i["left"], i["right"]),
        lambda i: true_reconstruction(i).square().sum((1, 2)),
        ("values", "left", "right"),
    ),
    "energy_from_gram": Op(
        lambda i: reference.energy_from_gram(kept_of(i), lk.gram(i["left"], i["right"])),
        lambda i: true_reconstruction(i).square().sum((1, 2)),
        ("values", "left", "right"),
    ),
    "reconstruct": Op(
        lambda i: lk.reconstruct(kept_of(i), i["left"], i["right"]),
        true_reconstruction,
        ("values", "left", "right"),
    ),
    "squared_residual_norm": Op(
        lambda i: lk.squared_residual_norm(kept_of(i), i["left"], i["right"], i["grad"]),
        lambda i: (i["grad"] - true_reconstruction(i)).square().sum((1, 2)),
        ("values", "left", "right", "grad"),
    ),
    "squared_gradient_norm": Op(
        lambda i: lk.squared_gradient_norm(i["x"], i["dy"]),
        lambda i: true_gradient(i).square().sum((1, 2)),
        ("x", "dy"),
    ),
    "outer": Op(
        lambda i: reference.outer(i["x"], i["dy"], i["right"].shape[2]),
        true_gradient,
        ("x", "dy"),
    ),
    "dense": Op(lambda i: kept_of(i).dense(), true_coefficients, ("values",)),
}
PUBLIC = [name for name in OPS if name in lk.__all__]


def combinations(cases: Iterable[str]) -> list[Any]:
    """Every operation with every case it takes: one that multiplies x out takes no indices."""
    return [
        pytest.param(name, case, id=f"{name}-{case}")
        for name, case in itertools.product(OPS, cases)
        if not (name == "project_tiled" and CASES[case].indices)
    ]


def with_leaves(inputs: Inputs, op: Op) -> tuple[Inputs, list[Tensor]]:
    """Copy the inputs, with gradients asked for where the operation has them."""
    copied = dict(inputs)
    for name in op.leaves:
        if inputs[name].is_floating_point():
            copied[name] = inputs[name].detach().clone().requires_grad_()
    return copied, [copied[name] for name in op.leaves if copied[name].requires_grad]


def results(run: Callable[[Inputs], Tensor], inputs: Inputs, op: Op) -> tuple[Tensor, list[Tensor]]:
    """Return the value, and the gradients of the leaves for a random upstream gradient."""
    own, leaves = with_leaves(inputs, op)
    value = run(own)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(value.dtype)
    if not leaves:
        return value, []
    grads = torch.autograd.grad(value, leaves, upstream, allow_unused=True, materialize_grads=True)
    return value, list(grads)


def assert_true(name: str, inputs: Inputs) -> None:
    """Hold an operation's value and gradients to the truth's."""
    op = OPS[name]
    value, grads = results(op.run, inputs, op)
    expected, expected_grads = results(op.truth, inputs, op)
    assert_relative(value, expected, VALUES)
    assert len(grads) == len(expected_grads)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_relative(grad, expected_grad, GRADIENTS)


@pytest.mark.parametrize("name, case", combinations(CASES))
def test_values_and_gradients_are_those_of_the_materialised_truth(name: str, case: str) -> None:
    """Each operation agrees with einsums over V and G, value to 1e-12 and gradients to 1e-10."""
    assert_true(name, make(CASES[case]))


def test_every_public_operation_is_held_to_a_truth() -> None:
    """No public operation is left out of these tests; top-k, decode and the softmax have their own."""
    assert set(lk.__all__) == {
        *PUBLIC,
        "SparseCoefficients",
        "batch_topk",
        "project_topk",
        "softmax_mean",
        "sparse_decode",
    }


@pytest.mark.parametrize("chunk", [1, 13, 100])
@pytest.mark.parametrize(
    "name, case", combinations(["odd", "many positions", "lopsided", "many subnetworks, few kept", "indices"])
)
def test_cutting_temporaries_into_pieces_changes_nothing(
    name: str, case: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a budget so small that every piece is short, values and gradients are still the truth's."""
    monkeypatch.setattr(reference, "CHUNK", chunk)
    assert len(reference.pieces(10, chunk)) == 10, "the budget is not read at the call"
    assert_true(name, make(CASES[case]))


@pytest.mark.parametrize("total", [0, 1, 5, 12])
@pytest.mark.parametrize("per_item", [0, 1, 3, 50])
def test_pieces_cover_everything_once_within_the_budget(
    total: int, per_item: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are consecutive, none is empty, and only a single item may exceed the budget."""
    monkeypatch.setattr(reference, "CHUNK", 7)
    cut = reference.pieces(total, per_item)
    assert [i for piece in cut for i in range(total)[piece]] == list(range(total))
    lengths = [piece.stop - piece.start for piece in cut]
    assert all(n == 1 or 1 <= n * per_item <= 7 or per_item == 0 for n in lengths)


@pytest.mark.parametrize(
    "name, case", combinations(["odd", "one position, one sample a sequence", "many positions", "lopsided"])
)
def test_strides_do_not_matter(name: str, case: str) -> None:
    """Inputs with gaps between elements, or transposed in memory, give what packed ones do."""
    plain = make(CASES[case])
    for restride in (
        lambda t: torch.stack([t, t + 1], -1)[..., 0],
        lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    ):
        strided = plain | {key: restride(plain[key]) for key in FLOATS}
        assert not strided["dy"].is_contiguous() or 1 in strided["dy"].shape
        assert_relative(OPS[name].run(strided), OPS[name].run(plain), VALUES)
        upstream_free = {key: strided[key].detach().requires_grad_() for key in OPS[name].leaves}
        value = OPS[name].run(strided | upstream_free)
        grads = torch.autograd.grad(value.square().sum(), list(upstream_free.values()))
        expected = {key: plain[key].clone().requires_grad_() for key in OPS[name].leaves}
        truth = OPS[name].truth(plain | expected)
        for grad, true in zip(grads, torch.autograd.grad(truth.square().sum(), list(expected.values())), strict=True):
            assert_relative(grad, true, GRADIENTS)


@pytest.mark.parametrize("name, case", combinations(["odd", "one position, one sample a sequence", "many positions"]))
def test_expanded_inputs_work(name: str, case: str) -> None:
    """Inputs repeated by a stride of zero, along samples, subnetworks or features, give the truth."""
    inputs = make(CASES[case])
    for dim in range(3):
        expanded = dict(inputs)
        for key in ("x", "dy", "left", "right", "grad"):
            expanded[key] = inputs[key].narrow(dim, 0, 1).expand_as(inputs[key])
        expanded["values"] = inputs["values"][:1].expand_as(inputs["values"])
        assert_relative(OPS[name].run(expanded), OPS[name].truth(expanded), VALUES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, case", combinations(["odd", "many positions", "indices", "nothing kept"]))
def test_dtype_follows_the_inputs(name: str, case: str, dtype: torch.dtype) -> None:
    """Results and gradients have the inputs' dtype, and are right to its precision."""
    inputs = make(CASES[case], dtype=dtype)
    wide = {
        key: value.double() if key in FLOATS and value.is_floating_point() else value for key, value in inputs.items()
    }
    op = OPS[name]
    own, leaves = with_leaves(inputs, op)
    value = op.run(own)
    assert value.dtype == dtype
    assert_relative(value, op.truth(wide), 20 * torch.finfo(dtype).eps)
    if leaves:
        grads = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
        assert [grad.dtype for grad in grads] == [dtype] * len(leaves)


@pytest.mark.parametrize("name", ["project", "project_at", "squared_gradient_norm"])
def test_indices_are_int64_or_int32(name: str) -> None:
    """Integers of both common widths are row numbers; narrower ones, which torch may take for masks, are refused."""
    inputs = make(CASES["indices"])
    narrow = inputs | {"x": inputs["x"].to(torch.int32)}
    assert_relative(OPS[name].run(narrow), OPS[name].truth(inputs), VALUES)
    for dtype in (torch.int16, torch.int8, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match=rf"x: expected .* got {dtype} \[2, 3\]"):
            OPS[name].run(inputs | {"x": inputs["x"].to(dtype)})


@pytest.mark.parametrize(
    "name, case", combinations(["odd", "rank one", "one position", "lopsided", "nothing kept", "indices"])
)
def test_gradcheck(name: str, case: str) -> None:
    """Analytic gradients agree with finite differences, for the hand-written backwards too."""
    op = OPS[name]
    inputs, leaves = with_leaves(make(CASES[case]), op)
    names = [key for key in op.leaves if inputs[key].requires_grad]
    assert leaves or not inputs["x"].is_floating_point()
    if leaves:
        run = lambda *tensors: op.run(inputs | dict(zip(names, tensors, strict=True)))  # noqa: E731
        torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("only", ["grad", "left", "right"])
def test_project_dense_differentiates_one_input_alone(only: str) -> None:
    """A gradient asked of one input alone is the one it has among all."""
    inputs = make(CASES["odd"])
    every, leaves = with_leaves(inputs, OPS["project_dense"])
    expected = torch.autograd.grad(OPS["project_dense"].truth(every).square().sum(), leaves)
    alone = inputs | {only: inputs[only].clone().requires_grad_()}
    (grad,) = torch.autograd.grad(OPS["project_dense"].run(alone).square().sum(), alone[only])
    assert_relative(grad, expected[OPS["project_dense"].leaves.index(only)], GRADIENTS)


@pytest.mark.parametrize("name", ["project_dense", "project_tiled", "gram_by_tiles"])
def test_second_derivatives_of_hand_written_backwards_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that is not itself differentiable says so, instead of returning zeros."""
    monkeypatch.setattr(reference, "CHUNK", 1)  # in one piece the backward of project_dense is autograd's
    own, leaves = with_leaves(make(CASES["odd"]), OPS[name])
    grads = torch.autograd.grad(OPS[name].run(own).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[-1].sum().backward()


@pytest.mark.parametrize(
    "sizes, route",
    [
        (Case(R=1), None),
        (Case(K=3, R=2, I=50, O=40), "gram_by_factors"),
        (Case(K=9, R=8, I=5, O=4), "gram_by_tiles"),
    ],
    ids=["rank one", "wide", "high rank"],
)
def test_gram_takes_the_cheaper_route(sizes: Case, route: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide matrices are met by their factors, high ranks by tiles; the value is the truth's on each route."""
    taken = []
    for name in ("gram_by_factors", "gram_by_tiles"):
        original = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, n=name, f=original: (taken.append(n), f(*a))[1])
    inputs = make(sizes)
    assert_relative(OPS["gram"].run(inputs), OPS["gram"].truth(inputs), VALUES)
    assert taken == ([] if route is None else [route])


@pytest.mark.parametrize(
    "sizes, route",
    [
        (Case(K=15, kept=4), "gram_energy_coactive"),
        (Case(K=15, kept=90), "energy_by_tiles"),
        (Case(S=60, K=15, kept=600), "energy_from_gram"),
        (Case(K=15, R=1, I=50, O=40, kept=90), "energy_from_gram"),  # rank one: cheap by factors
    ],
)
def test_energy_takes_the_cheaper_route(sizes: Case, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few co-active pairs are walked one by one, many met by the Gram matrix or by what few samples need of ĝ."""
    taken = []
    for name in ("gram_energy_coactive", "energy_by_tiles", "energy_from_gram"):
        original = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, n=name, f=original: (taken.append(n), f(*a))[1])
    inputs = make(sizes)
    assert_relative(OPS["gram_energy"].run(inputs), OPS["gram_energy"].truth(inputs), VALUES)
    assert taken == [route]


@pytest.mark.parametrize(
    "name, case", combinations(["odd", "many positions", "lopsided", "everything kept", "indices"])
)
def test_same_bits_twice(name: str, case: str) -> None:
    """Two calls on the same inputs give the same bits, value and gradients."""
    inputs = make(CASES[case], dtype=torch.float32)
    first, first_grads = results(OPS[name].run, inputs, OPS[name])
    second, second_grads = results(OPS[name].run, inputs, OPS[name])
    assert torch.equal(first, second)
    assert len(first_grads) == len(second_grads)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, second_grads, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_left_alone(name: str) -> None:
    """No operation writes into what it is given, forward or backward."""
    inputs = make(CASES["odd"])
    before = {key: inputs[key].clone() for key in FLOATS}
    own = inputs | {key: inputs[key].requires_grad_() for key in OPS[name].leaves}
    OPS[name].run(own).square().sum().backward()
    assert all(torch.equal(inputs[key], before[key]) for key in FLOATS)


def test_residual_does_not_cancel_where_the_error_is_small() -> None:
    """In float32 a relative residual of 1e-5 is right to 1e-2, where ‖G‖² − 2⟨ĝ,G⟩ + ‖ĝ‖² would be all rounding."""
    inputs = make(CASES["everything kept"], dtype=torch.float32)
    inputs["grad"] = true_reconstruction(inputs) * (1 + 1e-5)
    wide = {key: inputs[key].double() if key in FLOATS else inputs[key] for key in inputs}
    assert_relative(OPS["squared_residual_norm"].run(inputs), OPS["squared_residual_norm"].truth(wide), 1e-2)


# --- sparse_decode ----------------------------------------------------------------------------------------------


def decode_inputs(A: int, k: int, L: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(A + 10 * k + 100 * L)
    indices = torch.randint(L, (A, k), generator=generator)
    values = torch.randn(A, k, generator=generator, dtype=torch.float64)
    return indices, values, torch.randn(L, D, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(5, 3, 11, 7), (1, 1, 1, 1), (4, 6, 2, 3), (0, 3, 5, 2), (3, 0, 5, 2)])
def test_sparse_decode_sums_weighted_rows(sizes: tuple[int, int, int, int]) -> None:
    """[A, k] codes decode to Σ_j value_j weight[index_j], repeated indices included, with the truth's gradients."""
    indices, values, weight = decode_inputs(*sizes)
    own = [values.clone().requires_grad_(), weight.clone().requires_grad_()]
    true = [values.clone().requires_grad_(), weight.clone().requires_grad_()]
    result = lk.sparse_decode(indices, own[0], own[1])
    one_hot = torch.nn.functional.one_hot(indices, sizes[2]).double()
    expected = torch.einsum("ak,akl,ld->ad", true[0], one_hot, true[1])
    assert_relative(result, expected, VALUES)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for grad, expected_grad in zip(
        torch.autograd.grad(result, own, upstream), torch.autograd.grad(expected, true, upstream), strict=True
    ):
        assert_relative(grad, expected_grad, GRADIENTS)


@pytest.mark.parametrize("offsets", [[0, 2, 2, 5, 6], [0, 0, 0], [0, 6], [0, 0, 6, 6]])
def test_sparse_decode_by_offsets_takes_codes_of_any_length(offsets: list[int]) -> None:
    """The row_offsets form decodes codes of varying length, empty ones to zeros, with the truth's gradients."""
    n = offsets[-1]
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(4, (n,), generator=generator)
    own = [
        torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_(),
        torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_(),
    ]
    result = lk.sparse_decode(indices, own[0], own[1], torch.tensor(offsets))
    true = [tensor.detach().clone().requires_grad_() for tensor in own]
    rows = [
        sum((true[0][j] * true[1][indices[j]] for j in range(start, stop)), torch.zeros(3, dtype=torch.float64))
        for start, stop in itertools.pairwise(offsets)
    ]
    expected = torch.stack(rows)
    assert_relative(result, expected, VALUES)
    grads = torch.autograd.grad(result.square().sum() + 0 * own[0].sum() + 0 * own[1].sum(), own)
    expected_grads = torch.autograd.grad(expected.square().sum() + 0 * true[0].sum() + 0 * true[1].sum(), true)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_relative(grad, expected_grad, GRADIENTS)


def test_sparse_decode_forms_agree_and_pass_gradcheck() -> None:
    """Both forms give the same bits, in the inputs' dtype, non-contiguous ones included; gradients check out."""
    indices, values, weight = decode_inputs(5, 3, 11, 7)
    offsets = torch.arange(6) * 3
    for dtype in (torch.float64, torch.float32):
        square = lk.sparse_decode(indices, values.to(dtype), weight.to(dtype))
        ragged = lk.sparse_decode(indices.flatten(), values.flatten().to(dtype), weight.to(dtype), offsets)
        assert square.dtype == dtype
        assert torch.equal(square, ragged)
    strided = lk.sparse_decode(*(t.mT.contiguous().mT for t in (indices, values, weight)))
    assert_relative(strided, lk.sparse_decode(indices, values, weight), VALUES)
    leaves = (values.requires_grad_(), weight.requires_grad_())
    torch.autograd.gradcheck(lambda v, w: lk.sparse_decode(indices, v, w), leaves, fast_mode=True)
    torch.autograd.gradcheck(
        lambda v, w: lk.sparse_decode(indices.flatten(), v.flatten(), w, offsets), leaves, fast_mode=True
    )


# --- refusals ---------------------------------------------------------------------------------------------------


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def integers(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


FITTING = make(Case(B=3, S=6, T=4, I=5, O=7, K=2, R=2, kept=3), dtype=torch.float32)
REFUSED: list[tuple[str, Inputs, str]] = [
    ("project", {"dy": zeros(5, 4, 7)}, r"dy: expected shape \[S, 4, O\] with S a multiple of 3, got \[5, 4, 7\]"),
    ("project", {"dy": zeros(6, 3, 7)}, r"dy: expected shape \[S, 4, O\] with S a multiple of 3, got \[6, 3, 7\]"),
    ("project", {"dy": zeros(6, 4)}, r"dy: expected shape \[S, 4, O\] .* got \[6, 4\]"),
    ("project", {"x": zeros(3, 4)}, r"x: expected shape \[B, T, I\], or int64 \[B, T\], got torch.float32 \[3, 4\]"),
    ("project", {"x": integers(3, 4, 5)}, r"x: expected shape .* got torch.int64 \[3, 4, 5\]"),
    ("project", {"x": zeros(3, 4, 6)}, r"right: expected shape \[K, R, 6\] to match x, got \[2, 2, 5\]"),
    ("project", {"left": zeros(2, 2, 8)}, r"left: expected shape \[K, R, 7\] to match dy, got \[2, 2, 8\]"),
    ("project", {"left": zeros(2, 7)}, r"left: expected shape \[K, R, O\], got \[2, 7\]"),
    ("project", {"right": zeros(2, 3, 5)}, r"right: expected shape \[2, 2, I\] to match left, got \[2, 3, 5\]"),
    ("project", {"right": zeros(3, 2, 5)}, r"right: expected shape \[2, 2, I\] to match left, got \[3, 2, 5\]"),
    (
        "project_tiled",
        {"dy": zeros(6, 3, 7)},
        r"dy: expected shape \[S, 4, O\] with S a multiple of 3, got \[6, 3, 7\]",
    ),
    ("project_tiled", {"x": integers(3, 4)}, r"x: expected a floating dtype, got torch.int64"),
    ("project_tiled", {"right": zeros(2, 2, 4)}, r"right: expected shape \[K, R, 5\] to match x, got \[2, 2, 4\]"),
    ("project_at", {"dy": zeros(5, 4, 7)}, r"dy: expected shape \[S, 4, O\] with S a multiple of 3, got \[5, 4, 7\]"),
    ("project_at", {"dy": zeros(9, 4, 7)}, r"kept: expected coefficients of shape \[9, 2\], got \[6, 2\]"),
    ("project_at", {"left": zeros(4, 2, 7), "right": zeros(4, 2, 5)}, r"kept: expected .* \[6, 4\], got \[6, 2\]"),
    ("project_at", {"right": zeros(2, 2, 4)}, r"right: expected shape \[K, R, 5\] to match x, got \[2, 2, 4\]"),
    ("project_dense", {"grad": zeros(6, 5, 7)}, r"grad: expected shape \[S, 7, 5\] .* got \[6, 5, 7\]"),
    ("project_dense", {"grad": zeros(6, 35)}, r"grad: expected shape \[S, 7, 5\] .* got \[6, 35\]"),
    ("project_dense", {"left": zeros(7)}, r"left: expected shape \[K, R, O\], got \[7\]"),
    ("gram", {"right": zeros(2, 5)}, r"right: expected shape \[2, 2, I\] to match left, got \[2, 5\]"),
    ("gram_energy", {"left": zeros(3, 2, 7), "right": zeros(3, 2, 5)}, r"kept: expected .* \[6, 3\], got \[6, 2\]"),
    ("gram_energy_coactive", {"left": zeros(1, 2, 7), "right": zeros(1, 2, 5)}, r"kept: .* \[6, 1\], got \[6, 2\]"),
    ("reconstruct", {"left": zeros(1, 2, 7), "right": zeros(1, 2, 5)}, r"kept: .* \[6, 1\], got \[6, 2\]"),
    ("squared_residual_norm", {"grad": zeros(4, 7, 5)}, r"kept: expected .* \[4, 2\], got \[6, 2\]"),
    ("squared_residual_norm", {"grad": zeros(6, 7, 6)}, r"grad: expected shape \[S, 7, 5\] .* got \[6, 7, 6\]"),
    ("squared_gradient_norm", {"dy": zeros(5, 4, 7)}, r"dy: expected shape \[S, 4, O\] with S a multiple of 3, got"),
    ("squared_gradient_norm", {"x": zeros(3)}, r"x: expected shape"),
    (
        "project",
        {"left": zeros(2, 2, 7).double()},
        r"left: expected dtype torch.float32 to match dy, got torch.float64",
    ),
    ("project_at", {"right": zeros(2, 2, 5).half()}, r"right: expected dtype torch.float32 .* got torch.float16"),
    ("project_tiled", {"x": zeros(3, 4, 5).to("meta")}, r"x: expected device cpu to match dy, got meta"),
    ("project_dense", {"left": zeros(2, 2, 7).double()}, r"left: expected dtype torch.float32 to match grad, got"),
]


@pytest.mark.parametrize("name, changed, message", REFUSED)
def test_shapes_that_do_not_belong_together_are_refused(name: str, changed: Inputs, message: str) -> None:
    """A wrong shape raises one line: the argument, the expected shape, the one it got."""
    OPS[name].run(FITTING)
    with pytest.raises(ValueError, match=message) as error:
        OPS[name].run(FITTING | changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((integers(3), zeros(3), zeros(4, 2)), r"indices: expected shape \[A, k\], got \[3\]"),
        (
            (integers(3, 2), zeros(3, 2), zeros(4, 2), integers(4)),
            r"indices: expected shape \[N\] with row_offsets, got",
        ),
        ((integers(3, 2), zeros(3, 1), zeros(4, 2)), r"values: expected shape \[3, 2\] to match indices, got \[3, 1\]"),
        ((integers(3, 2), zeros(3, 2), zeros(4)), r"weight: expected shape \[L, D\], got \[4\]"),
    ],
)
def test_sparse_decode_refuses_shapes_that_do_not_belong_together(arguments: tuple, message: str) -> None:
    """A wrong shape raises one line: the argument, the expected shape, the one it got."""
    with pytest.raises(ValueError, match=message):
        lk.sparse_decode(*arguments)


def calls() -> dict[str, Callable[..., Tensor]]:
    """Every public operation, taking the backend."""
    f, kept = FITTING, kept_of(FITTING)
    return {
        "project": lambda **b: lk.project(f["x"], f["dy"], f["left"], f["right"], **b),
        "project_tiled": lambda **b: lk.project_tiled(f["x"], f["dy"], f["left"], f["right"], **b),
        "project_at": lambda **b: lk.project_at(f["x"], f["dy"], f["left"], f["right"], kept, **b),
        "project_dense": lambda **b: lk.project_dense(f["grad"], f["left"], f["right"], **b),
        "gram": lambda **b: lk.gram(f["left"], f["right"], **b),
        "gram_energy": lambda **b: lk.gram_energy(kept, f["left"], f["right"], **b),
        "gram_energy_coactive": lambda **b: lk.gram_energy_coactive(kept, f["left"], f["right"], **b),
        "reconstruct": lambda **b: lk.reconstruct(kept, f["left"], f["right"], **b),
        "squared_residual_norm": lambda **b: lk.squared_residual_norm(kept, f["left"], f["right"], f["grad"], **b),
        "squared_gradient_norm": lambda **b: lk.squared_gradient_norm(f["x"], f["dy"], **b),
        "sparse_decode": lambda **b: lk.sparse_decode(integers(2, 1), zeros(2, 1), zeros(3, 4), **b),
        "batch_topk": lambda **b: lk.batch_topk(zeros(2, 3), 2, **b).values,
        "project_topk": lambda **b: lk.project_topk(f["x"], f["dy"], f["left"], f["right"], 3, **b).values,
        "softmax_mean": lambda **b: lk.softmax_mean(zeros(2, 3), zeros(4, 3), **b),
    }


@pytest.mark.parametrize("name", calls())
def test_a_backend_that_cannot_be_had_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="triton" raises with the reason, no kernel or no GPU tensor; an unknown name lists those there are."""
    run = calls()[name]
    assert torch.equal(run(), run(backend="torch"))
    with pytest.raises(ValueError, match=r"backend: expected one of auto, torch, triton, got 'cuda'"):
        run(backend="cuda")
    dispatch.load_kernels()
    monkeypatch.delitem(dispatch.TRITON, name, raising=False)
    with pytest.raises(RuntimeError, match=rf"backend='triton': no Triton kernel for {name} "):
        run(backend="triton")


def test_a_kernel_is_taken_only_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel registered, a CPU tensor still takes the twin, and an explicit request for it is refused."""
    dispatch.load_kernels()
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setitem(dispatch.TRITON, "gram", lambda *a: pytest.fail("a kernel ran on a CPU tensor"))
    assert dispatch.implementation("gram", "auto", zeros(1)) is reference.gram
    assert dispatch.implementation("gram", "torch", zeros(1)) is reference.gram
    assert dispatch.implementation("gram", "torch", zeros(1).to("meta")) is reference.gram
    assert dispatch.implementation("gram", "auto", zeros(1).to("meta")) is dispatch.TRITON["gram"]
    with pytest.raises(RuntimeError, match=r"gram got a CPU tensor; move it to a GPU, .* TRITON_INTERPRET"):
        lk.gram(FITTING["left"], FITTING["right"], backend="triton")
