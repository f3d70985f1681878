"""Compare gradients in factors with their outer products: merging, multiplying out, norms and casts."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from l3d.gradients.factors import Dense, Gradients, Part, Rows, combine, compact, matrix_shape

from helpers import assert_relative, randn

TOLERANCE = 1e-12
B, P, T, I, O = 3, 2, 4, 5, 6
S = B * P
SHAPE = torch.Size([O, I])
FLOAT = torch.float64


def indices(*shape: int, high: int, seed: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def linear(seed: int, positions: int = T, sequences: int = B) -> Rows:
    """A Linear's rows: x along the columns."""
    return Rows(randn(sequences, positions, I, seed=seed), randn(S, positions, O, seed=seed + 50), x_axis=1)


def conv1d_of_gpt2(seed: int, positions: int = T, sequences: int = B) -> Rows:
    """Rows of a weight stored [I, O], here [O, I] with the letters exchanged: x along the rows."""
    return Rows(randn(sequences, positions, O, seed=seed), randn(S, positions, I, seed=seed + 50), x_axis=0)


def embedding(seed: int, positions: int = T, sequences: int = B) -> Rows:
    """A table's rows: x is an index into axis 0."""
    return Rows(indices(sequences, positions, high=O, seed=seed), randn(S, positions, I, seed=seed + 50), x_axis=0)


def dense(seed: int) -> Dense:
    return Dense(randn(S, *SHAPE, seed=seed))


def multiplied_out(part: Part) -> Tensor:
    """The definition: Σ_t dy[s, t] (x) x[s // (S // B), t], or its transpose."""
    if isinstance(part, Dense):
        return part.grad.reshape(S, O, I)
    grad = torch.zeros(S, O, I, dtype=FLOAT)
    share = S // len(part.x)
    for s, t in itertools.product(range(S), range(part.dy.shape[1])):
        x = part.x[s // share, t]
        if not x.is_floating_point():
            x = torch.eye(SHAPE[part.x_axis], dtype=FLOAT)[x]
        dy = part.dy[s, t]
        grad[s] += torch.outer(dy, x) if part.x_axis == 1 else torch.outer(x, dy)
    return grad


def gradients(parts: dict[str, list[Part]], shape: torch.Size = SHAPE) -> Gradients:
    return Gradients(parts, dict.fromkeys(parts, shape), S, FLOAT, torch.device("cpu"))


MIXTURES: dict[str, Callable[[], list[Part]]] = {
    "linear": lambda: [linear(0)],
    "one position": lambda: [linear(0, positions=1)],
    "conv1d of GPT-2": lambda: [conv1d_of_gpt2(0)],
    "embedding": lambda: [embedding(0)],
    "dense": lambda: [dense(0)],
    "called three times": lambda: [linear(0), linear(1, positions=2), linear(2, positions=1)],
    "looked up twice": lambda: [embedding(0), embedding(1, positions=7)],
    "embedding and head": lambda: [embedding(0), linear(1)],
    "embedding and head with a row per sample": lambda: [embedding(0), linear(1, positions=1, sequences=S)],
    "head before embedding": lambda: [linear(1, positions=1, sequences=S), embedding(0)],
    "tied to its own transpose": lambda: [linear(0), conv1d_of_gpt2(1)],
    "conv1d and embedding": lambda: [conv1d_of_gpt2(0), embedding(1)],
    "rows shared and not shared": lambda: [linear(0), linear(1, sequences=S), linear(2)],
    "rows and dense": lambda: [linear(0), dense(1), embedding(2)],
    "dense twice": lambda: [dense(0), dense(1)],
    "everything": lambda: [embedding(0), linear(1), dense(2), conv1d_of_gpt2(3), linear(4), embedding(5), dense(6)],
    "nothing": lambda: [],
}


@pytest.mark.parametrize("merge", [combine, list], ids=["merged", "not merged"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixed_parts(name: str, merge: Callable[[list[Part]], list[Part]]) -> None:
    """The sum of any parts, merged or not, multiplies out to the sum of outer products, and has its norm."""
    parts = MIXTURES[name]()
    expected = sum((multiplied_out(part) for part in parts), torch.zeros(S, O, I, dtype=FLOAT))
    actual = gradients({"w": merge(parts)})
    norm = actual.squared_norm()  # from the factors: nothing is multiplied out yet
    assert_relative(norm, expected.square().sum((1, 2)), TOLERANCE)
    assert_relative(actual.materialize()["w"], expected, TOLERANCE)
    assert_relative(actual.squared_norm(), expected.square().sum((1, 2)), TOLERANCE)  # from the matrices


def test_combine_appends_rows_and_adds_dense() -> None:
    """Rows of one kind become one part, appended along T, in the order they came; dense parts are added."""
    rows = [linear(0), embedding(1), linear(2, positions=3), embedding(3), dense(4), dense(5)]
    merged = combine(rows)
    assert [type(part) for part in merged] == [Rows, Rows, Dense]
    first, second, third = merged
    assert isinstance(first, Rows)
    assert isinstance(second, Rows)
    assert isinstance(third, Dense)
    assert torch.equal(first.x, torch.cat([rows[0].x, rows[2].x], 1))
    assert torch.equal(first.dy, torch.cat([rows[0].dy, rows[2].dy], 1))
    assert torch.equal(second.x, torch.cat([rows[1].x, rows[3].x], 1))
    assert second.x.dtype == torch.int64
    assert torch.equal(third.grad, rows[4].grad + rows[5].grad)


@pytest.mark.parametrize(
    "a, b",
    [
        (linear(0), conv1d_of_gpt2(1)),
        (linear(0), embedding(1)),
        (conv1d_of_gpt2(0), embedding(1)),
        (linear(0), linear(1, sequences=S)),
        (linear(0), dense(1)),
    ],
    ids=["other axis", "index and floats", "one axis, index and floats", "other sharing", "rows and dense"],
)
def test_combine_keeps_apart_what_differs(a: Part, b: Part) -> None:
    """Parts that cannot be one are both kept, in either order."""
    assert combine([a, b]) == [a, b]
    assert combine([b, a]) == [b, a]


def test_combine_leaves_its_parts_alone() -> None:
    """Merging changes neither the list nor any tensor of it."""
    parts: list[Part] = [linear(0), linear(1), dense(2), dense(3)]
    copies = [multiplied_out(part) for part in parts]
    combine(parts)
    assert len(parts) == 4
    assert all(torch.equal(multiplied_out(part), copy) for part, copy in zip(parts, copies, strict=True))


@pytest.mark.parametrize("make", [linear, conv1d_of_gpt2])
@pytest.mark.parametrize("positions", [1, 2, 3, 9, 40])
def test_compact_takes_the_smaller(make: Callable[..., Rows], positions: int) -> None:
    """Rows are multiplied out exactly where that is no larger than they are; the gradient is the same."""
    part = make(0, positions)
    result = compact(part, SHAPE)
    smaller = part.x.numel() + part.dy.numel() >= S * O * I
    assert isinstance(result, Dense) == smaller
    assert smaller == (positions >= 4)
    assert_relative(multiplied_out(result), multiplied_out(part), TOLERANCE)
    if isinstance(result, Dense):
        assert result.grad.shape == (S, *SHAPE)
    else:
        assert result is part


def test_compact_gives_the_parameters_own_shape() -> None:
    """A convolution's rows [O, C * kernel] are multiplied out to [S, O, C, kernel...]."""
    part = Rows(randn(B, 50, 12, seed=0), randn(S, 50, O, seed=1), x_axis=1)
    shape = torch.Size([O, 3, 2, 2])
    result = compact(part, shape)
    assert isinstance(result, Dense)
    assert result.grad.shape == (S, *shape)
    expected = torch.einsum("sto,sti->soi", part.dy, part.x.repeat_interleave(P, 0))
    assert_relative(result.grad.flatten(2), expected, TOLERANCE)
    assert_relative(gradients({"w": [result]}, shape).materialize()["w"].flatten(2), expected, TOLERANCE)


@pytest.mark.parametrize("positions", [1, 1000])
def test_compact_keeps_indices_and_dense(positions: int) -> None:
    """A look-up stays an index however often it is used, and what is dense stays as it is."""
    for part in (embedding(0, positions), dense(1)):
        assert compact(part, SHAPE) is part


@pytest.mark.parametrize("shape, matrix", [((), (1, 1)), ((6,), (6, 1)), ((6, 5), (6, 5)), ((6, 5, 3, 2), (6, 30))])
def test_matrix_shape(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    """Axis 0 against all the rest; vectors and scalars are a single column."""
    assert matrix_shape(torch.Size(shape)) == matrix


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 5), (6, 5, 2)], ids=str)
def test_dense_of_any_shape(shape: tuple[int, ...]) -> None:
    """Scalars, vectors and higher orders come back in their own shape, with their own norm."""
    grad = randn(S, *shape, seed=0)
    for multiply_first in (False, True):
        actual = gradients({"w": [Dense(grad)]}, torch.Size(shape))
        if multiply_first:
            assert torch.equal(actual.materialize()["w"], grad)
        assert_relative(actual.squared_norm(), grad.reshape(S, -1).square().sum(1), TOLERANCE)


def test_norm_is_over_all_parameters_together() -> None:
    """‖g_s‖² adds up over the parameters; one without parts adds nothing."""
    parts = {"a": [linear(0)], "b": [dense(1)], "c": [embedding(2), linear(3)], "d": []}
    expected = sum(gradients({name: some}).squared_norm() for name, some in parts.items())
    assert_relative(gradients(parts).squared_norm(), expected, TOLERANCE)


def test_a_parameter_without_parts_is_zero() -> None:
    """What the output does not depend on has a gradient of exactly zero, of the parameter's shape."""
    actual = gradients({"w": []}, torch.Size([6, 5, 2]))
    assert torch.equal(actual.materialize()["w"], torch.zeros(S, 6, 5, 2, dtype=FLOAT))
    assert torch.equal(actual.squared_norm(), torch.zeros(S, dtype=FLOAT))


def test_the_cross_term_of_a_tied_table_counts() -> None:
    """‖embedding + head‖² is not the sum of the two squares; the difference is twice their inner product."""
    parts: list[Part] = [embedding(0), linear(1, positions=1, sequences=S)]
    alone = sum(part.squared_norm() for part in parts)
    cross = 2 * (multiplied_out(parts[0]) * multiplied_out(parts[1])).sum((1, 2))
    assert cross.abs().min() > 1e-3
    assert_relative(gradients({"w": parts}).squared_norm() - alone, cross, 1e-10)


def test_opposite_parts_cancel() -> None:
    """Parts that cancel leave a gradient and a norm of zero, whatever form each has."""
    rows = linear(0)
    for opposite in (
        Rows(rows.x, -rows.dy, 1),
        Rows(rows.dy, -rows.x.repeat_interleave(P, 0), 0),
        Dense(-multiplied_out(rows)),
    ):
        actual = gradients({"w": [rows, opposite]})
        scale = multiplied_out(rows).square().sum((1, 2))
        assert (actual.squared_norm().abs() / scale).max() < TOLERANCE
        assert (actual.materialize()["w"].abs().amax((1, 2)) / scale.sqrt()).max() < TOLERANCE


def test_repeated_indices_add_up() -> None:
    """The same word twice in a text adds its two rows."""
    dy = randn(S, 2, I, seed=0)
    part = Rows(torch.full((B, 2), 4), dy, x_axis=0)
    grad = part.materialize((O, I))
    assert_relative(grad[:, 4], dy.sum(1), TOLERANCE)
    assert not grad[:, [0, 1, 2, 3, 5]].any()
    assert_relative(part.squared_norm(), dy.sum(1).square().sum(1), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cast(dtype: torch.dtype) -> None:
    """A cast changes the floating tensors, never the indices, and tells so; the original is as it was."""
    before = gradients({"a": [linear(0)], "b": [dense(1)], "c": [embedding(2), linear(3)], "d": []})
    after = before.to(torch.empty(0, dtype=dtype))
    assert after.dtype == dtype
    assert [t.dtype for _, t in after.tensors()] == [
        t.dtype if t.dtype == torch.int64 else dtype for _, t in before.tensors()
    ]
    assert before.dtype == FLOAT
    assert all(t.dtype in (FLOAT, torch.int64) for _, t in before.tensors())
    for name, grad in after.materialize().items():
        assert grad.dtype == dtype
        assert_relative(grad, before.materialize()[name], 16 * torch.finfo(dtype).eps)
    assert after.n_samples == S


def test_cast_to_the_same_is_the_same() -> None:
    """Casting to what it already is costs nothing."""
    actual = gradients({"w": [linear(0)]})
    assert actual.to(torch.empty(0, dtype=FLOAT)) is actual


def test_bytes_and_tensors() -> None:
    """The bytes are those of the factors, however large the gradients would be multiplied out."""
    parts: dict[str, list[Part]] = {"a": [linear(0), embedding(1)], "b": [dense(2)], "c": []}
    actual = gradients(parts)
    numbers = B * T * I + S * T * O + B * T + S * T * I + S * O * I
    assert actual.nbytes() == 8 * numbers
    assert [name for name, _ in actual.tensors()] == ["a", "a", "a", "a", "b"]
    actual.materialize()
    assert actual.nbytes() == 8 * numbers


def test_repr_shows_shapes_and_how_each_is_held() -> None:
    """One line in all, then one line per parameter; never a number of the tensors."""
    parts: dict[str, list[Part]] = {"a": [linear(0)], "b": [dense(2)], "c": [embedding(1, positions=7), linear(3)]}
    actual = gradients({**parts, "d": []})
    first, *rest = repr(actual).split("\n")
    assert first == f"Gradients: {S} samples, 4 tensors, torch.float64, cpu, {actual.nbytes()} bytes"
    assert rest == [
        "  a [6, 5]: rows T=4",
        "  b [6, 5]: dense",
        "  c [6, 5]: indices T=7 + rows T=4",
        "  d [6, 5]: zero",
    ]
    actual.materialize()
    assert repr(actual).split("\n") == [first, *rest]  # whatever has been multiplied out since


def test_matrices_are_remembered() -> None:
    """A gradient that was multiplied out once is not multiplied out again."""
    actual = gradients({"w": [linear(0)]})
    assert actual.matrix("w") is actual.matrix("w")
    assert actual.matrix("w").shape == (S, O, I)


@pytest.mark.parametrize(
    "samples",
    [list(range(S)), [S - 1], [4, 0, 3], [2, 2, 5, 2], [1, 0, 1, 0, 3, 4, 5, 2, 2]],
    ids=["all", "one", "some", "repeated", "more than there are"],
)
@pytest.mark.parametrize("name", MIXTURES)
def test_selecting_samples_is_indexing_what_they_multiply_out_to(name: str, samples: list[int]) -> None:
    """Whatever the form and the sharing, in the order asked for, repeats too; the original is as it was."""
    parts = MIXTURES[name]()
    expected = sum((multiplied_out(part) for part in parts), torch.zeros(S, O, I, dtype=FLOAT))[samples]
    for multiply_first in (False, True):
        original = gradients({"w": parts, "empty": []})
        if multiply_first:  # what is remembered belongs to other samples
            original.materialize()
        chosen = original.select(torch.tensor(samples))
        assert chosen.n_samples == len(samples)
        assert (chosen.dtype, chosen.device, chosen.shapes) == (FLOAT, original.device, original.shapes)
        assert_relative(chosen.squared_norm(), expected.square().sum((1, 2)), TOLERANCE)
        assert_relative(chosen.materialize()["w"], expected, TOLERANCE)
        assert torch.equal(chosen.materialize()["empty"], torch.zeros(len(samples), O, I, dtype=FLOAT))
        assert original.n_samples == S
        assert torch.equal(original.materialize()["w"], gradients({"w": parts}).materialize()["w"])


def test_selected_samples_stay_in_factors() -> None:
    """Nothing is multiplied out: each chosen sample holds its own positions' rows, and indices stay indices."""
    original = gradients({"a": [linear(0)], "b": [embedding(1, positions=7)], "c": [dense(2)]})
    chosen = original.select(torch.tensor([5, 5, 0]))
    numbers = 3 * T * (I + O) + 3 * 7 * (1 + I) + 3 * O * I
    assert chosen.nbytes() == 8 * numbers
    (table,) = chosen.parts["b"]
    assert isinstance(table, Rows)
    assert table.x.dtype == torch.int64
    again = chosen.select(torch.tensor([2, 0]))  # of a selection, every sample has a sequence of its own
    assert_relative(again.materialize()["a"], original.materialize()["a"][[0, 5]], TOLERANCE)


def test_selecting_from_a_convolution_and_a_vector() -> None:
    """Tensors of every order are indexed along their samples."""
    for shape in ((), (6,), (6, 5, 2)):
        grad = randn(S, *shape, seed=0)
        chosen = gradients({"w": [Dense(grad)]}, torch.Size(shape)).select(torch.tensor([3, 1, 3]))
        assert torch.equal(chosen.materialize()["w"], grad[[3, 1, 3]])
