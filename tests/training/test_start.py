"""Start directions from data: samples drawn by weight, directions the best low-rank part of their gradients."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from l3d.decomposition.directions import Directions, LowRank, resolve_ranks
from l3d.gradients.factors import Dense, Gradients, Part, Rows, matrix_shape
from l3d.training import start
from l3d.training.start import draw_samples, set_from_samples
from l3d_kernels import splitting

from helpers import assert_relative, randn

B, P, I, O = 3, 2, 5, 7
S = B * P
K = 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
pytestmark = pytest.mark.usefixtures("float64")  # random parts are drawn in torch's default type, and added in it


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- drawing ----------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize(
    "weights, possible",
    [
        ([1.0, 2.0, 3.0], [0, 1, 2]),
        ([0.0, 5.0, 0.0, 1e-30, 1.0], [1, 3, 4]),
        ([NAN, 1.0, -1.0, 2.0, -INF, 0.0], [1, 3]),
        ([INF, 1.0, 1e300], [1, 2]),
        ([0.0, 0.0, 4.0], [2]),
        ([0.0, 0.0], [0, 1]),
        ([NAN, -1.0, 0.0, INF], [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_exactly_n_are_drawn_from_the_possible_ones_and_repeats_only_when_they_run_out(
    weights: list[float], possible: list[int], n: int
) -> None:
    """Weights of zero, below and not finite are never drawn, unless all are: each other is, as evenly as n allows."""
    drawn = draw_samples(torch.tensor(weights, dtype=torch.float64), n, generator())
    assert drawn.shape == (n,)
    assert drawn.dtype == torch.int64
    assert set(drawn.tolist()) <= set(possible)
    counts = [drawn.tolist().count(sample) for sample in possible]
    assert min(counts) >= n // len(possible)
    assert max(counts) <= -(-n // len(possible))
    assert sorted(drawn[: len(possible)].tolist()) == sorted(set(drawn[: len(possible)].tolist()))


def test_draws_are_in_proportion_to_the_weights() -> None:
    """Over 2000 draws each sample's share is its weight's, within five deviations."""
    weights = torch.tensor([1.0, 0.0, 5.0, 2.0])
    source = generator()
    drawn = torch.cat([draw_samples(weights, 1, source) for _ in range(2000)])
    for sample, share in enumerate(weights / weights.sum()):
        deviation = math.sqrt(float(share) * (1 - float(share)) / 2000)
        assert abs(float((drawn == sample).double().mean()) - float(share)) <= 5 * deviation


def test_draws_come_from_the_generator_alone() -> None:
    """One state gives one draw whatever the global generator holds; that and the weights are left alone."""
    weights = torch.rand(50, generator=generator(1), requires_grad=True)
    before = weights.detach().clone()
    state = torch.get_rng_state()
    first = draw_samples(weights, 70, generator())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert torch.equal(draw_samples(weights, 70, generator()), first)
    assert not torch.equal(draw_samples(weights, 70, generator(1)), first)
    assert torch.equal(weights, before)


# --- directions -------------------------------------------------------------------------------------------------


def linear(positions: int, sequences: int = B) -> Rows:
    return Rows(randn(sequences, positions, I, seed=1), randn(S, positions, O, seed=2), 1)


def transposed(positions: int, sequences: int = B) -> Rows:
    """Rows of a weight whose inputs run along axis 0, as in GPT-2's Conv1D."""
    return Rows(randn(sequences, positions, O, seed=3), randn(S, positions, I, seed=4), 0)


def embedding(positions: int) -> Rows:
    return Rows(torch.randint(O, (B, positions), generator=generator(5)), randn(S, positions, I, seed=6), 0)


MATRICES: dict[str, Callable[[], list[Part]]] = {
    "linear": lambda: [linear(3)],
    "one position": lambda: [linear(1)],
    "one sequence": lambda: [linear(3, sequences=1)],
    "a sequence per sample": lambda: [linear(3, sequences=S)],
    "as many positions as inputs": lambda: [linear(I)],
    "more positions than inputs": lambda: [linear(9)],
    "transposed": lambda: [transposed(3)],
    "transposed, one sequence": lambda: [transposed(2, sequences=1)],
    "transposed, more positions than inputs": lambda: [transposed(9)],
    "embedding": lambda: [embedding(4)],
    "embedding and head": lambda: [embedding(3), linear(2)],
    "dense": lambda: [Dense(randn(S, O, I, seed=7))],
    "linear and dense": lambda: [linear(2), Dense(randn(S, O, I, seed=8))],
    "no part": list,
}


def multiplied_out(parts: list[Part], shape: tuple[int, ...]) -> Tensor:
    """The definition: Σ over parts and positions of dy (x) x, or its transpose: [S, *shape]."""
    total = torch.zeros(S, *shape, dtype=torch.float64)
    for part in parts:
        if isinstance(part, Dense):
            total += part.grad
            continue
        x = part.x if part.x.is_floating_point() else torch.eye(shape[0], dtype=torch.float64)[part.x]
        grad = torch.einsum("sto,sti->soi", part.dy, x.repeat_interleave(S // len(x), 0))
        total += grad if part.x_axis == 1 else grad.mT
    return total


def gradients(
    parts: dict[str, list[Part]], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64
) -> Gradients:
    sizes = {name: torch.Size(shape) for name, shape in shapes.items()}
    made = Gradients(parts, sizes, S, torch.float64, torch.device("cpu"))
    return made.to(torch.empty(0, dtype=dtype))


def sides(
    shapes: dict[str, torch.Size], rank: int | dict[str, int], dtype: torch.dtype = torch.float64
) -> list[Directions]:
    """An encoder and a decoder that differ."""
    ranks = resolve_ranks(rank, shapes)
    return [Directions(shapes, ranks, K, generator(seed)).to(dtype) for seed in (10, 11)]


def flat(directions: Directions) -> Tensor:
    """All directions over all tensors together: [K, parameters]."""
    return torch.stack(
        [torch.cat([t.flatten() for t in directions.tensors(k).values()]) for k in range(directions.n_subnetworks)]
    ).detach()


COLUMNS, SAMPLES = torch.tensor([4, 0, 2]), torch.tensor([5, 1, 1])


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No random direction is mixed in."""
    monkeypatch.setattr(start, "NOISE", 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in MATRICES if name != "no part"])
def test_at_full_rank_a_direction_is_the_sample_s_gradient_over_its_norm(
    name: str, dtype: torch.dtype, silent: None
) -> None:
    """Whatever form the gradient has, its sign, its scale of one and every entry come through; in both sides."""
    parts = MATRICES[name]()
    given = gradients({"w": parts}, {"w": (O, I)}, dtype)
    chosen = multiplied_out(parts, (O, I))[SAMPLES].flatten(1)
    expected = chosen / chosen.norm(dim=1, keepdim=True)
    both = sides(given.shapes, I, dtype)
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    for side in both:
        assert next(side.parameters()).dtype == dtype
        assert_relative(flat(side)[COLUMNS], expected, TOLERANCE[dtype])


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in MATRICES if name != "no part"])
def test_at_lower_rank_a_direction_is_the_best_approximation(name: str, rank: int, silent: None) -> None:
    """It is numpy's truncated SVD, of unit norm; what it explains is the sum of the largest squared singular values."""
    parts = MATRICES[name]()
    given = gradients({"w": parts}, {"w": (O, I)})
    chosen = multiplied_out(parts, (O, I))[SAMPLES]
    u, s, vh = np.linalg.svd(chosen.numpy(), full_matrices=False)
    truncated = torch.from_numpy((u[:, :, :rank] * s[:, None, :rank]) @ vh[:, :rank]).flatten(1)
    both = sides(given.shapes, rank)
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    found = flat(both[1])[COLUMNS]
    assert_relative(found, truncated / truncated.norm(dim=1, keepdim=True), 1e-10)
    assert_relative((found * chosen.flatten(1)).sum(1).square(), np.square(s[:, :rank]).sum(1).tolist(), 1e-12)


def test_rows_of_few_positions_are_never_multiplied_out(monkeypatch: pytest.MonkeyPatch, silent: None) -> None:
    """With fewer positions than inputs and outputs the factors are enough; with more the matrix is the smaller."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError("multiplied out")

    monkeypatch.setattr(Rows, "materialize", refuse)
    for part in (linear(I - 1), transposed(I - 1)):
        given = gradients({"w": [part]}, {"w": (O, I)})
        set_from_samples(sides(given.shapes, 2), COLUMNS, given, SAMPLES, generator())
    given = gradients({"w": [linear(I)]}, {"w": (O, I)})
    with pytest.raises(AssertionError, match="multiplied out"):
        set_from_samples(sides(given.shapes, 2), COLUMNS, given, SAMPLES, generator())


def test_matrices_are_taken_in_pieces_where_they_are_large(monkeypatch: pytest.MonkeyPatch, silent: None) -> None:
    """Cut into single samples, the directions are the same as in one piece."""
    results = []
    for chunk in (splitting.CHUNK, 1):
        monkeypatch.setattr(splitting, "CHUNK", chunk)
        given = gradients({"w": MATRICES["embedding"]()}, {"w": (O, I)})
        both = sides(given.shapes, 2)
        set_from_samples(both, COLUMNS, given, SAMPLES, generator())
        results.append(flat(both[0]))
    assert_relative(results[1], results[0], 1e-12)


CONVOLUTION = (5, 4, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [CONVOLUTION, (6, 1, 3), (2, 7, 2), (9, 2, 1, 1)], ids=str)
def test_at_full_rank_a_convolution_s_direction_is_its_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, silent: None
) -> None:
    """A Tucker product of full ranks holds any tensor, also where a mode is longer than all others together."""
    grad = randn(S, *shape, seed=1)
    given = gradients({"w": [Dense(grad)]}, {"w": shape}, dtype)
    both = [Directions(given.shapes, {"w": shape}, K, generator()).to(dtype) for _ in range(2)]
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    expected = grad[SAMPLES].flatten(1)
    for side in both:
        assert_relative(flat(side)[COLUMNS], expected / expected.norm(dim=1, keepdim=True), TOLERANCE[dtype])


@pytest.mark.parametrize("ranks", [(1, 1, 1, 1), (3, 2, 2, 3), (5, 4, 3, 1), (2, 4, 3, 3)], ids=str)
def test_at_lower_rank_a_convolution_s_direction_is_within_the_bound(ranks: tuple[int, ...], silent: None) -> None:
    """What it leaves lies between the largest and the sum of what each mode's singular values leave (De Lathauwer)."""
    grad = randn(S, *CONVOLUTION, seed=1)
    given = gradients({"w": [Dense(grad)]}, {"w": CONVOLUTION})
    both = [Directions(given.shapes, {"w": ranks}, K, generator()).double() for _ in range(2)]
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    chosen = grad[SAMPLES]
    explained = (flat(both[0])[COLUMNS] * chosen.flatten(1)).sum(1).square()
    for sample, left in zip(chosen.numpy(), (chosen.square().flatten(1).sum(1) - explained).tolist(), strict=True):
        tails = []
        for axis, rank in enumerate(ranks):
            unfolded = np.moveaxis(sample, axis, 0).reshape(len(sample) if axis == 0 else CONVOLUTION[axis], -1)
            tails.append(float(np.square(np.linalg.svd(unfolded, compute_uv=False)[rank:]).sum()))
        assert max(tails) - 1e-9 <= left <= sum(tails) + 1e-9


SHAPES: dict[str, tuple[int, ...]] = {"w": (O, I), "bias": (O,), "conv": (4, 3, 2), "scale": (), "unused": (3, 3)}


def mixture() -> dict[str, list[Part]]:
    return {
        "w": [linear(3)],
        "bias": [Dense(randn(S, O, seed=1))],
        "conv": [Dense(randn(S, 4, 3, 2, seed=2))],
        "scale": [Dense(randn(S, seed=3))],
        "unused": [],
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_norm_is_over_all_tensors_together(rank: int, dtype: torch.dtype, silent: None) -> None:
    """Every tensor keeps its share: all truncated parts of one gradient are scaled by one number."""
    parts = mixture()
    given = gradients(parts, SHAPES, dtype)
    both = sides(given.shapes, {"w": rank, "conv": 4, "*": 1}, dtype)
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    u, s, vh = np.linalg.svd(multiplied_out(parts["w"], (O, I))[SAMPLES].numpy(), full_matrices=False)
    whole = [torch.from_numpy((u[:, :, :rank] * s[:, None, :rank]) @ vh[:, :rank])]
    whole += [multiplied_out(parts[name], SHAPES[name])[SAMPLES] for name in list(SHAPES)[1:]]
    expected = torch.cat([each.flatten(1) if each.ndim > 1 else each[:, None] for each in whole], 1)
    for side in both:
        assert_relative(flat(side)[COLUMNS], expected / expected.norm(dim=1, keepdim=True), TOLERANCE[dtype])


@pytest.mark.parametrize("rank", [1, 3])
def test_float64_gradients_do_not_need_that_default(rank: int, silent: None) -> None:
    """Where torch's default is float32, a decomposition in float64 starts as well as one in float32 does."""
    torch.set_default_dtype(torch.float32)
    given = gradients({"w": [linear(rank)]}, {"w": (O, I)})
    both = sides(given.shapes, rank)
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    chosen = multiplied_out(given.parts["w"], (O, I))[SAMPLES].flatten(1)
    for side in both:
        assert all(parameter.dtype == torch.float64 for parameter in side.parameters())
        assert_relative(flat(side)[COLUMNS], chosen / chosen.norm(dim=1, keepdim=True), 1e-6)


@pytest.mark.parametrize("factor", [1e-25, 1e-10, 1e10])
def test_the_scale_of_the_gradients_does_not_matter(factor: float, silent: None) -> None:
    """In float32 gradients of any size give the same directions, also where their squares cannot be held."""
    torch.set_default_dtype(torch.float32)
    results = []
    for scale in (1.0, factor):
        part = linear(3)
        given = gradients({"w": [Rows(part.x, part.dy * scale, 1)]}, {"w": (O, I)}, torch.float32)
        both = sides(given.shapes, 3, torch.float32)
        set_from_samples(both, COLUMNS, given, SAMPLES, generator())
        results.append(flat(both[0])[COLUMNS])
    assert_relative(results[1], results[0], 1e-4)


# --- with the random part ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_only_the_named_directions_change(dtype: torch.dtype) -> None:
    """The others keep their bits; the named ones are of unit norm, the same bits in encoder and decoder."""
    given = gradients(mixture(), SHAPES, dtype)
    both = sides(given.shapes, 2, dtype)
    before = [[p.detach().clone() for p in side.parameters()] for side in both]
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    others = torch.tensor([k for k in range(K) if k not in COLUMNS.tolist()])
    for side, old in zip(both, before, strict=True):
        for parameter, was in zip(side.parameters(), old, strict=True):
            assert parameter.requires_grad
            assert torch.equal(parameter[others], was[others])
            assert not any(torch.equal(parameter[k], was[k]) for k in COLUMNS)
        assert_relative(side.squared_norm()[COLUMNS], torch.ones(3), TOLERANCE[dtype])
    for ours, theirs in zip(both[0].parameters(), both[1].parameters(), strict=True):
        assert torch.equal(ours[COLUMNS], theirs[COLUMNS])


def test_gradients_and_generators_are_left_as_they_were() -> None:
    """The gradients are not written to, nothing comes from the global generator, one state gives one result."""
    given = gradients(mixture(), SHAPES)
    copies = [tensor.clone() for _, tensor in given.tensors()]
    state = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        both = sides(given.shapes, 2)
        set_from_samples(both, COLUMNS, given, SAMPLES, generator(seed))
        results.append(flat(both[0]))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, copy) for (_, t), copy in zip(given.tensors(), copies, strict=True))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_little_of_a_random_direction_is_mixed_in() -> None:
    """The gradient stays by far the larger part, and two subnetworks of one sample are not the same."""
    given = gradients(mixture(), SHAPES)
    both = sides(given.shapes, {"w": 3, "conv": 4, "*": 1})
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    wanted = torch.cat([multiplied_out(p, SHAPES[n])[SAMPLES].reshape(3, -1) for n, p in mixture().items()], 1)
    cosines = torch.nn.functional.cosine_similarity(flat(both[0])[COLUMNS], wanted)
    assert cosines.min() > 0.9
    assert cosines.max() < 0.9999
    again, once_more = flat(both[0])[COLUMNS[1:]]  # both of sample 1
    assert (again - once_more).norm() > 0.01


def test_what_the_gradient_leaves_empty_can_still_learn() -> None:
    """Of a gradient of lower rank no factor row is zero in either factor: such a row would never leave zero."""
    given = gradients({"w": [linear(1)], "unused": []}, {"w": (O, I), "unused": (3, 3)})
    both = sides(given.shapes, 3)
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    for piece in both[0].pieces:
        assert isinstance(piece, LowRank)
        for factor in (piece.left, piece.right):
            assert factor[COLUMNS].norm(dim=2).min() > 1e-3


def test_a_sample_without_a_gradient_gives_a_random_direction() -> None:
    """Zeros do not become NaN: the direction is finite and of unit norm."""
    part = linear(3)
    part.dy[SAMPLES[0]] = 0
    given = gradients({"w": [part]}, {"w": (O, I)})
    both = sides(given.shapes, 2)
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    assert flat(both[0]).isfinite().all()
    assert_relative(both[0].squared_norm(), torch.ones(K), 1e-6)


def test_bfloat16_is_taken_too(silent: None) -> None:
    """A decomposition in bfloat16 starts from data as well, to that type's precision."""
    parts: dict[str, list[Part]] = {
        "rows": [linear(3)],
        "table": [embedding(3)],
        "conv": [Dense(randn(S, 4, 3, 2, seed=2))],
    }
    shapes: dict[str, tuple[int, ...]] = {"rows": (O, I), "table": (O, I), "conv": (4, 3, 2)}
    given = gradients(parts, shapes, torch.bfloat16)
    both = sides(given.shapes, {"conv": 4, "*": I}, torch.bfloat16)
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    wanted = torch.cat([multiplied_out(parts[name], shapes[name])[SAMPLES].flatten(1) for name in shapes], 1)
    assert_relative(flat(both[0])[COLUMNS], wanted / wanted.norm(dim=1, keepdim=True), 0.03)


@pytest.mark.parametrize("shape", [(O, I), (I, O), (3, 2, 2), (4,), ()], ids=str)
def test_every_shape_is_of_unit_norm(shape: tuple[int, ...]) -> None:
    """Wide and tall matrices, tensors of higher order, vectors and scalars: the norm is one."""
    given = gradients({"w": [Dense(randn(S, *shape, seed=1))]}, {"w": shape})
    both = sides(given.shapes, min(2, *matrix_shape(torch.Size(shape))))
    set_from_samples(both, COLUMNS, given, SAMPLES, generator())
    assert_relative(both[1].squared_norm()[COLUMNS], torch.ones(3), 1e-12)
