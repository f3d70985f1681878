"""The CPU path: values, gradients, dtypes, strides and routes of every op, against the definitions and the truths."""

import itertools

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels import cpu, reference, splitting
from l3d_kernels.cpu import energy

from helpers import assert_relative
from op_cases import (
    CASES,
    DEFINED,
    FLOATS,
    GRADIENTS,
    OPS,
    VALUES,
    Case,
    Inputs,
    assert_true,
    combinations,
    decode_inputs,
    kept_of,
    make,
    results,
    true_reconstruction,
    with_leaves,
)
from tools import normal


def run(name: str, inputs: Inputs) -> Tensor:
    """Run an op as the package does on a CPU."""
    return OPS[name].run(lk, inputs)


@pytest.mark.parametrize("name, case", combinations(CASES))
def test_values_and_gradients_are_those_of_the_materialised_truth(name: str, case: str) -> None:
    """Each op agrees with einsums over V and G, value to 1e-12 and gradients to 1e-10."""
    assert_true(name, make(CASES[case]))


@pytest.mark.parametrize("name, case", [pair for pair in combinations(CASES) if pair.values[0] in DEFINED])
def test_values_and_gradients_are_those_of_the_definition(name: str, case: str) -> None:
    """The CPU path agrees with `l3d_kernels.reference` in float64, value to 1e-12 and gradients to 1e-10."""
    inputs, op = make(CASES[case]), OPS[name]
    value, grads = results(lambda i: op.run(cpu, i), inputs, op)
    expected, expected_grads = results(lambda i: op.run(reference, i), inputs, op)
    assert_relative(value, expected, VALUES)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_relative(grad, expected_grad, GRADIENTS)


@pytest.mark.parametrize("chunk", [1, 13, 100])
@pytest.mark.parametrize(
    "name, case", combinations(["odd", "many positions", "lopsided", "many subnetworks, few kept", "indices"])
)
def test_cutting_temporaries_into_pieces_changes_nothing(
    name: str, case: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a budget so small that every piece is short, values and gradients are still the truth's."""
    monkeypatch.setattr(splitting, "CHUNK", chunk)
    assert len(splitting.pieces(10, chunk)) == 10, "the budget is not read at the call"
    assert_true(name, make(CASES[case]))


@pytest.mark.parametrize("total", [0, 1, 5, 12])
@pytest.mark.parametrize("per_item", [0, 1, 3, 50])
def test_pieces_cover_everything_once_within_the_budget(
    total: int, per_item: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are consecutive, none is empty, and only a single item may exceed the budget."""
    monkeypatch.setattr(splitting, "CHUNK", 7)
    cut = splitting.pieces(total, per_item)
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
        assert_relative(run(name, strided), run(name, plain), VALUES)
        upstream_free = {key: strided[key].detach().requires_grad_() for key in OPS[name].leaves}
        value = run(name, strided | upstream_free)
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
        assert_relative(run(name, expanded), OPS[name].truth(expanded), VALUES)


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
    value = op.run(lk, own)
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
    assert_relative(run(name, narrow), OPS[name].truth(inputs), VALUES)
    for dtype in (torch.int16, torch.int8, torch.uint8, torch.bool):
        with pytest.raises(ValueError, match=rf"x: expected .* got {dtype} \[2, 3\]"):
            run(name, inputs | {"x": inputs["x"].to(dtype)})


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
        call = lambda *tensors: op.run(lk, inputs | dict(zip(names, tensors, strict=True)))  # noqa: E731
        torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("only", ["grad", "left", "right"])
def test_project_dense_differentiates_one_input_alone(only: str) -> None:
    """A gradient asked of one input alone is the one it has among all."""
    inputs = make(CASES["odd"])
    every, leaves = with_leaves(inputs, OPS["project_dense"])
    expected = torch.autograd.grad(OPS["project_dense"].truth(every).square().sum(), leaves)
    alone = inputs | {only: inputs[only].clone().requires_grad_()}
    (grad,) = torch.autograd.grad(run("project_dense", alone).square().sum(), alone[only])
    assert_relative(grad, expected[OPS["project_dense"].leaves.index(only)], GRADIENTS)


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
        original = getattr(energy, name)
        monkeypatch.setattr(energy, name, lambda *a, n=name, f=original: (taken.append(n), f(*a))[1])
    inputs = make(sizes)
    assert_relative(run("gram", inputs), OPS["gram"].truth(inputs), VALUES)
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
        original = getattr(energy, name)
        monkeypatch.setattr(energy, name, lambda *a, n=name, f=original: (taken.append(n), f(*a))[1])
    inputs = make(sizes)
    assert_relative(run("gram_energy", inputs), OPS["gram_energy"].truth(inputs), VALUES)
    assert taken == [route]


def test_the_energy_of_several_tensors_is_their_sum_in_order() -> None:
    """Lists of tensors of any ranks and widths: to the bit the sum one by one, and by value the definition's."""
    inputs = make(CASES["odd"])
    kept, K = kept_of(inputs), len(inputs["left"])
    left, right = [inputs["left"], normal(K, 4, 3, seed=1)], [inputs["right"], normal(K, 4, 6, seed=2)]
    together = lk.gram_energy_coactive(kept, left, right)
    alone = [lk.gram_energy_coactive(kept, *own) for own in zip(left, right, strict=True)]
    assert torch.equal(together, alone[0] + alone[1])
    assert_relative(together, reference.gram_energy_coactive(kept, left, right), VALUES)
    grams = [lk.gram(*own) for own in zip(left, right, strict=True)]
    assert torch.equal(lk.gram(left, right), grams[0] + grams[1])
    assert_relative(lk.gram(left, right), reference.gram(left, right), VALUES)


@pytest.mark.parametrize(
    "name, case", combinations(["odd", "many positions", "lopsided", "everything kept", "indices"])
)
def test_same_bits_twice(name: str, case: str) -> None:
    """Two calls on the same inputs give the same bits, value and gradients."""
    inputs = make(CASES[case], dtype=torch.float32)
    first, first_grads = results(lambda i: run(name, i), inputs, OPS[name])
    second, second_grads = results(lambda i: run(name, i), inputs, OPS[name])
    assert torch.equal(first, second)
    assert len(first_grads) == len(second_grads)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, second_grads, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_left_alone(name: str) -> None:
    """No operation writes into what it is given, forward or backward."""
    inputs = make(CASES["odd"])
    before = {key: inputs[key].clone() for key in FLOATS}
    own = inputs | {key: inputs[key].requires_grad_() for key in OPS[name].leaves}
    run(name, own).square().sum().backward()
    assert all(torch.equal(inputs[key], before[key]) for key in FLOATS)


def test_residual_does_not_cancel_where_the_error_is_small() -> None:
    """In float32 a relative residual of 1e-5 is right to 1e-2, where ‖G‖² − 2⟨ĝ,G⟩ + ‖ĝ‖² would be all rounding."""
    inputs = make(CASES["everything kept"], dtype=torch.float32)
    inputs["grad"] = true_reconstruction(inputs) * (1 + 1e-5)
    wide = {key: inputs[key].double() if key in FLOATS else inputs[key] for key in inputs}
    assert_relative(run("squared_residual_norm", inputs), OPS["squared_residual_norm"].truth(wide), 1e-2)


# --- sparse_decode ----------------------------------------------------------------------------------------------


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


# --- top-k, decoding and the softmax against their definitions ---------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_batch_topk_keeps_what_its_definition_keeps(ties: bool, n_groups: int, dtype: torch.dtype) -> None:
    """Every field has the bits of the definition's, ties, NaN and infinities included; so has the gradient."""
    coefficients = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    coefficients = coefficients.round() if ties else coefficients
    coefficients[3, 1], coefficients[4, 10], coefficients[9, 5] = torch.nan, -torch.inf, torch.inf
    coefficients.requires_grad_()
    for n in (0, 1, 17, 80):
        own, defined = (ops.batch_topk(coefficients, n, n_groups) for ops in (cpu, reference))
        for a, b in zip(own[:-1], defined[:-1], strict=True):
            assert torch.equal(a.nan_to_num(nan=9e4), b.nan_to_num(nan=9e4))
        grads = [torch.autograd.grad((k.values * (1 + k.columns)).sum(), coefficients)[0] for k in (own, defined)]
        assert torch.equal(*grads)


@pytest.mark.parametrize(
    "case", ["odd", "one sample a sequence", "indices", "everything kept", "many subnetworks, few kept"]
)
@pytest.mark.parametrize("based", [False, True])
def test_project_topk_keeps_what_its_definition_keeps(case: str, based: bool) -> None:
    """Value and gradients agree with the definition, with and without coefficients of other tensors."""
    found = []
    for ops in (cpu, reference):
        inputs = make(CASES[case])
        left, right = (inputs[name].requires_grad_() for name in ("left", "right"))
        base = inputs["grad"][:, :1, :1].expand(-1, len(left), 1)[:, :, 0] if based else None
        kept = ops.project_topk(inputs["x"], inputs["dy"], left, right, CASES[case].kept, base)
        found.append((kept, torch.autograd.grad(kept.values.sin().sum(), (left, right))))
    (own, grads), (defined, expected) = found
    assert torch.equal(own.rows, defined.rows)
    assert torch.equal(own.columns, defined.columns)
    assert_relative(own.values, defined.values, VALUES)
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert_relative(grad, expected_grad, GRADIENTS)


@pytest.mark.parametrize("form", ["square", "ragged"])
def test_sparse_decode_is_its_definition(form: str) -> None:
    """Value and gradients agree with the definition in both forms."""
    found = []
    for ops in (cpu, reference):
        indices, values, weight = decode_inputs(5, 3, 11, 7)
        leaves = (values.requires_grad_(), weight.requires_grad_())
        offsets = None if form == "square" else torch.tensor([0, 2, 2, 9, 15])
        codes = (indices, values) if form == "square" else (indices.flatten(), values.flatten())
        value = ops.sparse_decode(*codes, weight, offsets)
        found.append((value, *torch.autograd.grad(value.sin().sum(), leaves)))
    for own, defined in zip(*found, strict=True):
        assert_relative(own, defined, VALUES)


@pytest.mark.parametrize("biased", [False, True])
def test_softmax_mean_is_its_definition(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary in pieces gives the definition's value."""
    monkeypatch.setattr(splitting, "CHUNK", 64)
    _, hidden, weight = decode_inputs(5, 7, 30, 7)
    bias = weight[:, 0].clone() if biased else None
    assert_relative(cpu.softmax_mean(hidden, weight, bias), reference.softmax_mean(hidden, weight, bias), VALUES)
