"""Compare a batch's loss with a float64 computation that materialises every gradient and every direction."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import l3d
import l3d_kernels as lk
from l3d.api import Decomposition
from l3d.decomposition import costs
from l3d.decomposition import directions as directions_module
from l3d.decomposition import flat as flat_module
from l3d.decomposition.costs import Path, Plan, Sizes
from l3d.decomposition.directions import Directions, LowRank, Whole
from l3d.decomposition.objective import Objective, energy, n_kept, objective
from l3d.gradients.factors import Gradients, Rows
from l3d_kernels import splitting

from helpers import assert_relative
from problems import PROBLEMS, setup

LOSS, PATHS = 1e-9, 1e-10
KS = [1e-6, 0.1, 0.35, 1.0]


@pytest.fixture(params=[0, flat_module.SMALL], ids=["any size", "small"], autouse=True)
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test on the path for all sizes, and again with the one that small problems take."""
    monkeypatch.setattr(flat_module, "SMALL", request.param)


def materialised(directions: Directions) -> Tensor:
    """Multiply every direction out with one einsum per tensor: [K, parameters]."""
    flat = []
    for name, piece in directions.items():
        if isinstance(piece, Whole):
            whole = piece.vector
        elif isinstance(piece, LowRank):
            whole = torch.einsum("kro,kri->koi", piece.left, piece.right)
        else:
            order = len(directions.shapes[name])
            ranks, dims = "abcdef"[:order], "uvwxyz"[:order]
            terms = ",".join(f"k{r}{d}" for r, d in zip(ranks, dims, strict=True))
            whole = torch.einsum(f"k{ranks},{terms}->k{dims}", piece.core, *piece.modes)
        flat.append(whole.flatten(1))
    return torch.cat(flat, 1)


class Truth(NamedTuple):
    loss: Tensor
    kept: list[int]  # flat


def brute_force(gradients: Gradients, encoder: Directions, decoder: Directions, n: int) -> Truth:
    """The loss by definition: project, keep the n largest, reconstruct, subtract."""
    g = torch.cat([grad.flatten(1) for grad in gradients.materialize().values()], 1)
    coefficients = g @ materialised(encoder).mT
    kept = coefficients.detach().abs().flatten().argsort(descending=True, stable=True)[:n]
    mask = torch.zeros(coefficients.numel(), dtype=g.dtype).index_fill(0, kept, 1).view_as(coefficients)
    residual = g - (coefficients * mask) @ materialised(decoder)
    return Truth(residual.square().sum() / g.square().sum(), sorted(kept.tolist()))


def flat(result: Objective) -> list[int]:
    return (result.kept.rows * result.kept.shape[1] + result.kept.columns).tolist()


def parameter_gradients(loss: Tensor, decomposition: Decomposition) -> list[Tensor]:
    parameters = list(decomposition.parameters())
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_is_that_of_the_materialised_computation(name: str, k: float) -> None:
    """Loss, norm, what is kept and all parameter gradients are the brute-force ones."""
    gradients, d = setup(name)
    result = objective(gradients, d.encoder, d.decoder, k)
    n = max(1, math.floor(k * gradients.n_samples * d.n_subnetworks + 0.5))
    truth = brute_force(gradients, d.encoder, d.decoder, n)
    assert flat(result) == truth.kept
    assert_relative(result.loss, truth.loss, LOSS)
    squared_norm = sum(g.square().sum() for g in gradients.materialize().values())
    assert_relative(result.squared_norm, squared_norm, LOSS)
    for grad, expected in zip(parameter_gradients(result.loss, d), parameter_gradients(truth.loss, d), strict=True):
        assert_relative(grad, expected, LOSS)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_decomposition_loss_and_encode_are_the_objective(name: str, k: float) -> None:
    """`Decomposition.loss` and `encode` give the brute-force loss and all coefficients."""
    gradients, d = setup(name)
    n = max(1, math.floor(k * gradients.n_samples * d.n_subnetworks + 0.5))
    assert_relative(d.loss(gradients, k), brute_force(gradients, d.encoder, d.decoder, n).loss, LOSS)
    g = torch.cat([grad.flatten(1) for grad in gradients.materialize().values()], 1)
    assert_relative(d.encode(gradients), g @ materialised(d.encoder).mT, LOSS)


# --- paths ------------------------------------------------------------------------------------------------------


def has_indices(gradients: Gradients, name: str) -> bool:
    return any(isinstance(part, Rows) and not part.x.is_floating_point() for part in gradients.parts[name])


def path_choices(gradients: Gradients, directions: Directions, tiled: bool = False) -> dict[str, list[Path]]:
    """Every path each tensor can take: vectors and materialised gradients cannot be sampled, nor indices tiled."""
    choices = {}
    for name, piece in directions.items():
        rows = not isinstance(piece, Whole) and all(isinstance(part, Rows) for part in gradients.parts[name])
        sampled = (False, True) if rows else (False,)
        whole = isinstance(piece, Whole) or (tiled and has_indices(gradients, name))
        matrix = (False,) if whole else (False, True)
        choices[name] = [Path(m, s) for m, s in itertools.product(matrix, sampled)]
    return choices


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("coactive", [False, True])
@pytest.mark.parametrize("k", [0.1, 1.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_path_gives_the_same_loss_and_gradients(
    name: str, k: float, coactive: bool, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Materialised, whole or in tiles, or factored; dense or sampled; full or co-active Gram: all agree to 1e-10."""
    if tiled:  # no gradient is small enough to be held whole
        monkeypatch.setattr(splitting, "CHUNK", 1)
    gradients, d = setup(name)
    n = max(1, math.floor(k * gradients.n_samples * d.n_subnetworks + 0.5))
    truth = brute_force(gradients, d.encoder, d.decoder, n)
    expected = parameter_gradients(truth.loss, d)
    choices = path_choices(gradients, d.encoder, tiled)
    uniform = [
        {name: path if path in paths else paths[0] for name, paths in choices.items()}
        for path in itertools.starmap(Path, itertools.product((False, True), repeat=2))
    ]
    mixed = [{n: paths[(i + shift) % len(paths)] for i, (n, paths) in enumerate(choices.items())} for shift in (0, 1)]
    for paths in uniform + mixed:
        fresh, _ = setup(name)  # a materialised gradient is remembered: every path starts without it
        result = objective(fresh, d.encoder, d.decoder, k, Plan(paths=paths, coactive=coactive))
        assert flat(result) == truth.kept
        assert_relative(result.loss, truth.loss, PATHS)
        for grad, wanted in zip(parameter_gradients(result.loss, d), expected, strict=True):
            assert_relative(grad, wanted, PATHS)


def test_the_path_problems_reach_every_path() -> None:
    """The problems above hold rows of floats and of indices, materialised gradients, vectors and Tucker pieces."""
    kinds = set()
    for name in PROBLEMS:
        gradients, d = setup(name)
        for tensor, piece in d.encoder.items():
            for part in gradients.parts[tensor]:
                index = isinstance(part, Rows) and not part.x.is_floating_point()
                shared = isinstance(part, Rows) and part.x.shape[0] < part.dy.shape[0]
                kinds.add((type(piece).__name__, type(part).__name__, index, shared))
    pieces = {kind[:2] for kind in kinds}
    assert {("Whole", "Dense"), ("LowRank", "Rows"), ("LowRank", "Dense"), ("Tucker", "Dense")} <= pieces
    assert {
        ("LowRank", "Rows", True, True),
        ("LowRank", "Rows", False, True),
        ("LowRank", "Rows", False, False),
    } <= kinds


@pytest.mark.parametrize("k", [0.05, 1.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_bits_twice(name: str, k: float) -> None:
    """The same batch gives the same bits twice, loss and gradients."""
    runs = []
    for _ in range(2):
        gradients, d = setup(name)
        result = objective(gradients, d.encoder, d.decoder, k)
        runs.append([result.loss, *parameter_gradients(result.loss, d)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# --- small errors -----------------------------------------------------------------------------------------------


def nearly_exact(n_positions: int, noise: float) -> tuple[Gradients, Decomposition]:
    """Gradients with disjoint inputs, and directions that are those gradients, plus a little noise."""
    S, T, O = 6, n_positions, 5
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(S, T, S * T, dtype=torch.float64)
    for s, t in itertools.product(range(S), range(T)):  # sample s alone uses inputs s*T..: G are orthogonal
        x[s, t, s * T + t] = 1 + torch.rand((), generator=generator)
    dy = torch.randn(S, T, O, generator=generator, dtype=torch.float64)
    shapes = {"weight": torch.Size([O, S * T])}
    gradients = Gradients({"weight": [Rows(x, dy, 1)]}, shapes, S, torch.float64, x.device)
    d = Decomposition(shapes, S, T).double()
    norms = torch.einsum("sti,sto->soi", x, dy).flatten(1).norm(dim=1)
    with torch.no_grad():
        for directions in (d.encoder, d.decoder):
            piece = directions.pieces[0]
            for tensor, rows in ((piece.left, dy), (piece.right, x)):
                tensor.copy_(rows / norms.sqrt().view(-1, 1, 1))
                tensor.add_(
                    noise * tensor.norm() / tensor.numel() ** 0.5 * torch.randn(tensor.shape, generator=generator)
                )
    d.normalize_()
    return gradients, d


@pytest.mark.parametrize("path", list(itertools.starmap(Path, itertools.product((False, True), repeat=2))))
@pytest.mark.parametrize("coactive", [False, True])
@pytest.mark.parametrize("k", [1 / 6, 1.0])
@pytest.mark.parametrize("n_positions", [1, 3])
def test_loss_is_exact_where_it_is_small(n_positions: int, k: float, coactive: bool, path: Path) -> None:
    """At an error near 1e-4, where the terms cancel, the loss is right to 1e-9 and its gradients to 1e-9."""
    gradients, d = nearly_exact(n_positions, 5e-3)
    truth = brute_force(gradients, d.encoder, d.decoder, round(k * 36))
    assert 3e-5 < truth.loss < 3e-4
    result = objective(gradients, d.encoder, d.decoder, k, Plan(paths={"weight": path}, coactive=coactive))
    assert_relative(result.loss, truth.loss, LOSS)
    for grad, expected in zip(parameter_gradients(result.loss, d), parameter_gradients(truth.loss, d), strict=True):
        assert_relative(grad, expected, LOSS)


@pytest.mark.parametrize("path", list(itertools.starmap(Path, itertools.product((False, True), repeat=2))))
@pytest.mark.parametrize("coactive", [False, True])
def test_float32_resolves_an_error_of_1e_4(coactive: bool, path: Path) -> None:
    """In float32 an error near 1e-4 is right to 1 % on every path, as the design promises."""
    gradients, d = nearly_exact(3, 5e-3)
    truth = brute_force(gradients, d.encoder, d.decoder, 6)
    narrow = d.float()
    plan = Plan(paths={"weight": path}, coactive=coactive)
    result = objective(gradients.to(next(narrow.parameters())), d.encoder, d.decoder, 1 / 6, plan)
    assert result.loss.dtype == torch.float32
    assert_relative(result.loss, truth.loss, 1e-2)


def test_loss_of_a_perfect_decomposition_is_zero() -> None:
    """Directions that are the gradients themselves reconstruct them: the error is rounding, and not NaN."""
    gradients, d = nearly_exact(3, 0.0)
    assert abs(d.loss(gradients, 1 / 6).item()) < 1e-14


# --- how many are kept ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, n_samples, n_subnetworks, expected",
    [
        (0.1, 32, 5, 16),
        (0.5, 1, 1, 1),  # 0.5 rounds up
        (0.5, 1, 5, 3),  # 2.5 too: not to the even number
        (0.25, 2, 3, 2),
        (0.125, 4, 5, 3),
        (0.1, 2, 7, 1),  # 1.4
        (0.1, 4, 4, 2),  # 1.6
        (1e-9, 3, 3, 1),  # never none
        (1.0, 7, 3, 21),
        (0.999, 7, 3, 21),
        (0.1, 1, 1, 1),
    ],
)
def test_number_kept_is_rounded_half_up(k: float, n_samples: int, n_subnetworks: int, expected: int) -> None:
    """floor(k·S·K + ½) coefficients of a batch are kept, at least one, never more than there are."""
    assert n_kept(k, n_samples, n_subnetworks) == expected
    gradients, d = nearly_exact(1, 0.1)
    result = objective(gradients, d.encoder, d.decoder, k)
    assert result.kept.rows.numel() == max(1, math.floor(k * 36 + 0.5))


# --- several decompositions side by side ------------------------------------------------------------------------


def side_by_side(name: str, n_groups: int) -> tuple[Decomposition, list[Decomposition]]:
    """Decompositions of one problem, each with directions of its own, together and apart."""
    gradients, _ = setup(name)
    problem, parts = PROBLEMS[name], []
    for seed in range(n_groups):
        generator = torch.Generator().manual_seed(100 + seed)
        part = Decomposition(gradients.shapes, problem.n_subnetworks, problem.rank).double()
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.normal_(generator=generator)
        part.normalize_()
        parts.append(part)
    return Decomposition.side_by_side(parts), parts


def residuals(gradients: Gradients, d: Decomposition, kept: list[int]) -> Tensor:
    """‖g_s − ĝ_s‖² with the kept coefficients, flat indices into [S, K], multiplied out: [S]."""
    g = torch.cat([grad.flatten(1) for grad in gradients.materialize().values()], 1)
    coefficients = g @ materialised(d.encoder).mT
    mask = torch.zeros(coefficients.numel(), dtype=g.dtype).index_fill(0, torch.tensor(kept), 1)
    return (g - (coefficients * mask.view_as(coefficients)) @ materialised(d.decoder)).square().sum(1)


@pytest.mark.parametrize("coactive", [None, False, True])
@pytest.mark.parametrize("k", [0.1, 1.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_groups_are_objectives_of_their_own(name: str, k: float, coactive: bool | None) -> None:
    """On every path, three decompositions in one call have the losses, residuals and gradients each has alone."""
    whole, parts = side_by_side(name, 3)
    K = parts[0].n_subnetworks
    truths, expected, alone = [], [], []
    for part in parts:
        gradients, _ = setup(name)
        n = max(1, math.floor(k * gradients.n_samples * K + 0.5))
        truths.append(brute_force(gradients, part.encoder, part.decoder, n))
        expected.append(parameter_gradients(truths[-1].loss, part))
        alone.append(residuals(gradients, part, truths[-1].kept))
    choices = path_choices(setup(name)[0], whole.encoder)
    uniform = [
        {name: path if path in paths else paths[0] for name, paths in choices.items()}
        for path in itertools.starmap(Path, itertools.product((False, True), repeat=2))
    ]
    for paths in [None, *uniform]:
        gradients, _ = setup(name)
        result = objective(gradients, whole.encoder, whole.decoder, k, Plan(n_groups=3, paths=paths, coactive=coactive))
        assert_relative(result.loss, torch.stack([truth.loss for truth in truths]), PATHS)
        assert_relative(result.residual, torch.stack(alone, 1), PATHS)
        assert_relative(result.residual.sum(0) / result.squared_norm, result.loss, 1e-12)
        assert result.kept.shape == (gradients.n_samples, 3 * K)
        pairs = {(int(row), int(column)) for row, column in zip(result.kept.rows, result.kept.columns, strict=True)}
        assert pairs == {(i // K, g * K + i % K) for g, truth in enumerate(truths) for i in truth.kept}
        together = parameter_gradients(result.loss.sum(), whole)
        for grad, *wanted in zip(together, *expected, strict=True):
            assert_relative(grad, torch.cat(wanted), PATHS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_group_s_loss_moves_no_other_group(name: str) -> None:
    """The gradient of the second loss is zero in the first and third decomposition."""
    whole, parts = side_by_side(name, 3)
    gradients, _ = setup(name)
    K = parts[0].n_subnetworks
    result = objective(gradients, whole.encoder, whole.decoder, 0.2, Plan(n_groups=3))
    grads = parameter_gradients(result.loss[1], whole)
    assert any(grad[K : 2 * K].any() for grad in grads)
    assert not any(grad[:K].any() or grad[2 * K :].any() for grad in grads)


@pytest.mark.parametrize("k", [0.1, 1.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_residuals_are_each_sample_s_and_sum_to_the_loss(name: str, k: float) -> None:
    """Of one decomposition the residuals are [S], ‖g_s − ĝ_s‖² by definition, and differentiable."""
    gradients, d = setup(name)
    result = objective(gradients, d.encoder, d.decoder, k)
    assert result.loss.shape == ()
    assert_relative(result.residual, residuals(gradients, d, flat(result)), PATHS)
    assert_relative(result.residual.sum() / result.squared_norm, result.loss, 1e-12)
    (found,) = torch.autograd.grad(result.residual[1], [next(d.decoder.parameters())])
    again = residuals(setup(name)[0], d, flat(result))[1]
    assert_relative(found, torch.autograd.grad(again, [next(d.decoder.parameters())])[0], PATHS)


def test_groups_whose_gram_is_too_large_to_be_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above SMALL_GRAM directions each group's Gram matrix is taken by itself: the same losses and gradients."""
    results = []
    for limit in (10**6, 0):
        monkeypatch.setattr(directions_module, "SMALL_GRAM", limit)
        whole, _ = side_by_side("linear on positions", 3)
        gradients, _ = setup("linear on positions")
        result = objective(gradients, whole.encoder, whole.decoder, 0.3, Plan(n_groups=3, coactive=False))
        results.append([result.loss, result.residual, *parameter_gradients(result.loss.sum(), whole)])
    for cut_out, by_itself in zip(*results, strict=True):
        assert_relative(by_itself, cut_out, PATHS)


@pytest.mark.parametrize("coactive", [False, True])
def test_a_backend_reaches_every_operation(coactive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="torch" avoids the kernels: every operation of a loss gets it, none gets "auto"."""
    asked: list[str] = []

    def told(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, backend: str = "auto", **options: object) -> object:
            asked.append(f"{real.__name__} {backend}")
            return real(*arguments, backend=backend, **options)

        return call

    gradients, d = setup(next(iter(PROBLEMS)))
    for name in lk.__all__[1:]:
        monkeypatch.setattr(lk, name, told(getattr(lk, name)))
    for path in (Path(False, False), Path(False, True), Path(True, False), Path(True, True)):
        choices = path_choices(gradients, d.encoder)
        paths = {name: path if path in own else own[0] for name, own in choices.items()}
        objective(gradients, d.encoder, d.decoder, 0.3, Plan(paths=paths, coactive=coactive, backend="torch"))
    assert {line.split()[1] for line in asked} == {"torch"}, asked
    energies = "gram_energy_coactive" if coactive else "gram"
    assert {line.split()[0] for line in asked} >= {"squared_gradient_norm", "batch_topk", energies}


def test_gram_of_groups_is_taken_in_full_or_over_co_active_pairs() -> None:
    """The choice by cost goes both ways for several groups too, and the energy is the same either way."""
    gradients, _ = setup("linear")
    d = Decomposition(gradients.shapes, 400, 2).double()
    for k, expected in ((0.005, True), (1.0, False)):
        kept = objective(gradients, d.encoder, d.decoder, k, Plan(n_groups=2)).kept
        assert costs.coactive_is_cheaper(d.decoder, kept, 2) == expected
        by_pairs, in_full = (energy(kept, d.decoder, Plan(n_groups=2, coactive=coactive)) for coactive in (True, False))
        assert by_pairs.shape == (gradients.n_samples, 2)
        assert_relative(by_pairs, in_full, PATHS)


# --- properties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "convolution", "linear on positions"])
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_splitting_a_batch_changes_nothing_when_all_is_kept(name: str, cut: int) -> None:
    """At k = 1 samples do not compete for coefficients: a batch's residual is the sum of its parts'."""
    problem = PROBLEMS[name]
    _, d = setup(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = problem.build().double().eval()
    inputs = problem.inputs(torch.Generator().manual_seed(1))

    def score(rows: Tensor) -> Objective:
        return objective(l3d.extract_gradients(model, rows, reference="uniform"), d.encoder, d.decoder, 1.0)

    whole, parts = score(inputs), [score(inputs[:cut]), score(inputs[cut:])]
    assert_relative(sum(part.squared_norm for part in parts), whole.squared_norm, PATHS)
    assert_relative(sum(part.loss * part.squared_norm for part in parts), whole.loss * whole.squared_norm, PATHS)


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e5])
@pytest.mark.parametrize("name", PROBLEMS)
def test_error_does_not_depend_on_the_scale_of_the_divergence(name: str, factor: float) -> None:
    """Multiplying all gradients by a number changes neither the error nor what is kept."""
    gradients, d = setup(name)
    scaled, _ = setup(name)
    for parts in scaled.parts.values():
        for part in parts:
            (part.dy if isinstance(part, Rows) else part.grad).mul_(factor)
    plain = objective(gradients, d.encoder, d.decoder, 0.2)
    result = objective(scaled, d.encoder, d.decoder, 0.2)
    assert flat(result) == flat(plain)
    assert_relative(result.loss, plain.loss, PATHS)
    assert_relative(result.squared_norm, plain.squared_norm * factor**2, PATHS)


@pytest.mark.parametrize("name", ["linear", "convolution", "tied language model"])
def test_error_does_not_depend_on_how_factors_share_their_scale(name: str) -> None:
    """Moving a scale from one factor of a tensor to another is the same direction, so the same error."""
    gradients, d = setup(name)
    before = d.loss(gradients, 0.2)
    with torch.no_grad():
        for directions in (d.encoder, d.decoder):
            for piece in directions.pieces:
                if not isinstance(piece, Whole):
                    first, *_, last = piece.parameters()
                    first.mul_(8)
                    last.div_(8)
    assert_relative(d.loss(gradients, 0.2), before, PATHS)


def test_residuals_are_never_below_what_the_decoder_cannot_reach() -> None:
    """The error at k = 1 is at least that of the best reconstruction in the decoder's span, and the loss is ≥ 0."""
    for name in PROBLEMS:
        gradients, d = setup(name)
        g = torch.cat([grad.flatten(1) for grad in gradients.materialize().values()], 1)
        basis = torch.linalg.qr(materialised(d.decoder).mT).Q
        best = (g - g @ basis @ basis.mT).square().sum() / g.square().sum()
        assert d.loss(gradients, 1.0) >= best * (1 - 1e-9)


# --- the choice of path -----------------------------------------------------------------------------------------

REGIMES = {
    "toy": (Sizes(32, 32, 1, 5, 2, 5, 1, 16), Path(False, False)),
    "toy in warm start": (Sizes(32, 32, 1, 10, 5, 10, 1, 320), Path(False, False)),
    "16 tokens, width 256, rank 25": (Sizes(16, 256, 16, 256, 256, 100, 25, 2560), Path(True, False)),
    "the same with 2 % kept": (Sizes(16, 256, 16, 256, 256, 100, 25, 512), Path(True, True)),
    "the same in warm start": (Sizes(16, 256, 16, 256, 256, 100, 25, 25600), Path(True, False)),
    "the same at rank 4": (Sizes(16, 256, 16, 256, 256, 100, 4, 2560), Path(False, False)),
    "width 4096, rank 25": (Sizes(16, 256, 16, 4096, 4096, 100, 25, 2560), Path(False, True)),
    "width 4096 in warm start": (Sizes(16, 256, 16, 4096, 4096, 100, 25, 25600), Path(False, False)),
    "a convolution": (Sizes(16, 16, 1024, 144, 16, 100, 8, 160), Path(True, False)),
    "width 64, rank 32": (Sizes(16, 256, 16, 64, 64, 100, 32, 2560), Path(True, False)),
}


@pytest.mark.parametrize("sizes, expected", REGIMES.values(), ids=REGIMES)
def test_costs_choose_the_path_of_each_regime(sizes: Sizes, expected: Path) -> None:
    """Large T or high rank at small width: materialise; few kept at high rank: sample; else the plain path."""
    counted = costs.projection_costs(sizes)
    assert set(counted) == set(itertools.starmap(Path, itertools.product((False, True), repeat=2)))
    assert min(counted, key=counted.__getitem__) == expected


def test_every_path_is_chosen_somewhere() -> None:
    """Each path is the cheapest in some regime: none is dead code."""
    assert {expected for _, expected in REGIMES.values()} == set(
        itertools.starmap(Path, itertools.product((False, True), repeat=2))
    )


@pytest.mark.parametrize("field", ["n_positions", "n_samples", "n_subnetworks", "n_inputs", "n_outputs"])
def test_costs_grow_with_every_size(field: str) -> None:
    """More of anything never makes a path cheaper."""
    small = Sizes(4, 8, 3, 5, 7, 6, 2, 9)
    large = Sizes(**{**vars(small), field: 3 * getattr(small, field)})
    before, after = costs.projection_costs(small), costs.projection_costs(large)
    assert all(after[path] >= before[path] for path in before)
    assert any(after[path] > before[path] for path in before)


@pytest.mark.parametrize("name", PROBLEMS)
def test_paths_are_chosen_for_every_tensor_and_fit_it(name: str) -> None:
    """Every tensor gets a path it can take; indices are never multiplied out."""
    gradients, d = setup(name)
    for n in (1, gradients.n_samples * d.n_subnetworks):
        chosen = costs.choose_paths(gradients, d.encoder, n)
        assert list(chosen) == d.parameter_names
        for tensor, path in chosen.items():
            assert path in path_choices(gradients, d.encoder)[tensor]
            assert not (path.materialised and has_indices(gradients, tensor))


def test_gram_is_taken_in_full_or_over_co_active_pairs() -> None:
    """Few kept of many subnetworks: co-active pairs; all kept: the full matrix. The energy is the same."""
    gradients, _ = setup("linear")
    d = Decomposition(gradients.shapes, 200, 2).double()
    sparse, full = (objective(gradients, d.encoder, d.decoder, k).kept for k in (0.005, 1.0))
    for kept, expected in ((sparse, True), (full, False)):
        assert costs.coactive_is_cheaper(d.decoder, kept) == expected
        by_pairs, in_full = (energy(kept, d.decoder, Plan(coactive=coactive)) for coactive in (True, False))
        assert_relative(by_pairs, in_full, PATHS)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.0, -0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(k: float) -> None:
    """`Decomposition.loss` names k and its range."""
    gradients, d = setup("linear")
    with pytest.raises(ValueError, match=r"k: expected a fraction in \(0, 1\], got"):
        d.loss(gradients, k)


def test_gradients_of_other_parameters_are_refused() -> None:
    """Gradients of other tensors, or of other shapes, are named and refused."""
    gradients, _ = setup("linear")
    _, other = setup("convolution")
    for call in (other.loss, other.encode):
        with pytest.raises(ValueError, match=r"gradients: expected those of 0\.weight, .* got 0\.weight, 0\.bias"):
            call(gradients)


def test_a_broken_encoder_cannot_hide() -> None:
    """NaN in a direction makes the loss NaN at any k, also where its coefficients would not be kept."""
    for k in (0.1, 1.0):
        gradients, d = setup("linear")
        with torch.no_grad():
            d.encoder.pieces[0].left[0] = float("nan")
        assert d.loss(gradients, k).isnan()
