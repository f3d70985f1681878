"""Compare every figure of an evaluation with a loop that computes it by definition."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import l3d
from l3d.api import Decomposition

from helpers import Root, assert_relative

N, BATCH, K = 29, 7, 6  # the last batch of one row joins the one before: 7 7 7 8


def net() -> nn.Module:
    """A small network in float64, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def points(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decomposition(**settings: Any) -> Decomposition:
    """A decomposition with random directions, as if trained with the settings."""
    chosen = {"k": 0.2, "divergence": "mse", "reference": "uniform", "batch_size": BATCH, "seed": 0, "positions": "all"}
    shapes = {name: p.shape for name, p in net().named_parameters()}
    d = Decomposition(shapes, K, 2, {**chosen, **settings}).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.normal_(generator=generator)
    d.normalize_()
    return d


def flat(directions: Any) -> Tensor:
    """All directions over all tensors: [K, parameters]."""
    tensors = [directions.tensors(k) for k in range(K)]
    return torch.stack([torch.cat([t.flatten() for t in each.values()]) for each in tensors]).detach()


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


def batches(x: Tensor) -> list[Tensor]:
    cuts = [*range(0, len(x), BATCH)]
    if len(x) % BATCH == 1:
        cuts.pop()
    return [x[a:b] for a, b in zip(cuts, [*cuts[1:], len(x)], strict=True)]


def per_sample(model: nn.Module, x: Tensor, reference: str) -> Tensor:
    """Gradients of a batch, one backward pass each: [S, parameters]."""
    y = model(x)
    references = y.detach().mean(0).expand_as(y) if reference == "mean" else torch.zeros_like(y)
    return torch.stack([gradient(model, (y[s] - references[s]).square().mean()) for s in range(len(x))])


def brute_force(model: nn.Module, d: Decomposition, x: Tensor, reference: str, k: float) -> dict[str, Any]:
    """Evaluate by definition, batch by batch."""
    encoder, decoder = flat(d.encoder), flat(d.decoder)
    residual = norm = 0.0
    kept = []
    for batch in batches(x):
        g = per_sample(model, batch, reference)
        c = g @ encoder.mT
        n = max(1, math.floor(k * c.numel() + 0.5))
        mask = torch.zeros(c.numel(), dtype=torch.bool)
        mask[c.abs().flatten().argsort(descending=True)[:n]] = True
        kept.append(mask.view_as(c))
        residual += float((g - (c * kept[-1]) @ decoder).square().sum())
        norm += float(g.square().sum())
    mask = torch.cat(kept)
    return {
        "error": residual / norm,
        "kept_per_sample": float(mask.sum() / len(x)),
        "activation_rate": mask.double().mean(0),
        "dead_fraction": float((~mask.any(0)).double().mean()),
        "n_samples": len(x),
    }


# --- evaluate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1e-9, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("reference", ["uniform", "mean"])
def test_every_figure_is_the_brute_force_one(reference: str, k: float) -> None:
    """Error, kept, activation rates and dead fraction are those of a loop over samples, over all of the data."""
    model, d = net(), decomposition(reference=reference, k=k)
    found = d.evaluate(model, points())
    expected = brute_force(model, d, points(), reference, k)
    assert found.error == pytest.approx(expected["error"], rel=1e-10)
    assert_relative(found.activation_rate, expected["activation_rate"], 1e-6)
    assert found.kept_per_sample == pytest.approx(expected["kept_per_sample"], rel=1e-6)
    assert found.dead_fraction == pytest.approx(expected["dead_fraction"])
    assert found.n_samples == N
    assert found.activation_rate.shape == (K,)
    assert float(found.activation_rate.sum()) == pytest.approx(found.kept_per_sample, rel=1e-6)


def test_overrides_take_the_place_of_the_settings() -> None:
    """k, reference, divergence and batch_size given to evaluate are those that count."""
    model, d = net(), decomposition(k=0.9, reference="mean", divergence="mse_published", batch_size=2)
    found = d.evaluate(model, points(), k=0.2, reference="uniform", divergence="mse", batch_size=BATCH)
    assert found.error == pytest.approx(brute_force(model, d, points(), "uniform", 0.2)["error"], rel=1e-10)
    assert l3d.evaluate(d, model, points(), k=1.0).kept_per_sample == K


def test_dead_subnetworks_are_counted() -> None:
    """Subnetworks whose encoder sees nothing are never kept: a third of six is dead."""
    model, d = net(), decomposition()
    with torch.no_grad():
        for parameter in d.encoder.parameters():
            parameter[2] = parameter[5] = 0
    found = d.evaluate(model, points())
    assert found.dead_fraction == pytest.approx(1 / 3)
    assert (found.activation_rate == 0).tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("data", ["dataset", "labels", "loader", "list", "generator"])
def test_every_kind_of_data_gives_the_same_figures(data: str) -> None:
    """Datasets, with labels or without, and streams of the same batches give what the tensor gives."""
    model, d, x = net(), decomposition(reference="mean"), points(28)
    expected = d.evaluate(model, x)
    given = {
        "dataset": TensorDataset(x),
        "labels": TensorDataset(x, torch.arange(28)),
        "loader": DataLoader(TensorDataset(x, torch.arange(28)), batch_size=BATCH),
        "list": list(x.split(BATCH)),
        "generator": (batch for batch in x.split(BATCH)),
    }[data]
    found = d.evaluate(model, given)
    assert found.error == expected.error
    assert torch.equal(found.activation_rate, expected.activation_rate)


def test_drawn_references_depend_on_the_seed_alone() -> None:
    """The same seed gives the same figures, whatever the global generator holds; another draws anew."""
    model, d = net(), decomposition(reference="sample")
    torch.manual_seed(1)
    first = d.evaluate(model, points())
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = d.evaluate(model, points())
    assert first.error == second.error
    assert torch.equal(first.activation_rate, second.activation_rate)
    assert torch.equal(torch.get_rng_state(), state)
    assert d.evaluate(model, points(), seed=1).error != first.error


def test_partners_are_each_other_s_reference() -> None:
    """In batches of two, the drawn reference can only be the other row: the error is the brute-force one."""
    model, x = net(), points(10)
    d = decomposition(reference="sample", batch_size=2, k=1.0)
    partners = x.view(5, 2, 4).flip(1).reshape(10, 4)
    y, other = model(x), model(partners).detach()
    g = torch.stack([gradient(model, (y[s] - other[s]).square().mean()) for s in range(10)])
    residual = g - g @ flat(d.encoder).mT @ flat(d.decoder)
    expected = float(residual.square().sum() / g.square().sum())
    for n_references in (1, 4):
        assert d.evaluate(model, x, n_references=n_references).error == pytest.approx(expected, rel=1e-10)
    contrast = TensorDataset(x, partners)
    assert d.evaluate(model, contrast, reference="pair").error == pytest.approx(expected, rel=1e-10)


def test_more_references_are_more_draws_and_less_noise() -> None:
    """n_references averages over draws: the spread over seeds shrinks; rates and kept are still per sample."""
    model, d = net(), decomposition(reference="sample")

    def spread(n_references: int) -> float:
        errors = [d.evaluate(model, points(), seed=s, n_references=n_references).error for s in range(12)]
        return float(torch.tensor(errors, dtype=torch.float64).std())

    assert spread(16) < 0.6 * spread(1)
    found = d.evaluate(model, points(), n_references=3)
    assert float(found.activation_rate.sum()) == pytest.approx(found.kept_per_sample, rel=1e-6)
    with pytest.raises(ValueError, match="n_references: expected at least 1, got 0"):
        d.evaluate(model, points(), n_references=0)


def test_an_overriding_reference_decides_whether_anything_is_drawn() -> None:
    """A decomposition trained with the mean can be scored with drawn references, drawn anew n_references times."""
    model, d = net(), decomposition(reference="mean")
    once = d.evaluate(model, points(), reference="sample")
    assert d.evaluate(model, points(), reference="sample", n_references=5).error != once.error


def test_samples_of_a_language_model_are_positions() -> None:
    """With kl every chosen position of every row is a sample, and rates are per position."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).eval()
    tokens = torch.randint(9, (6, 5))
    for positions, per_row in (("all", 5), ("last", 1), (2, 2)):
        d = l3d.decompose(
            model, tokens, 3, rank=2, k=0.5, divergence="kl", positions=positions, steps=3, batch_size=3, progress=False
        )
        found = d.evaluate(model, tokens)
        assert found.n_samples == 6 * per_row
        assert found.kept_per_sample == pytest.approx(1.5, abs=1 / (3 * per_row))
        numbered = 5 if positions == 2 else per_row
        assert d.impact(model, tokens, n_references=2).shape == (6 * numbered, 3)


def test_drawn_positions_have_all_of_them_numbered() -> None:
    """Each draw picks others, so that a number would mean another position in each: all are looked at instead."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).eval()
    tokens = torch.randint(9, (6, 5))
    chosen = {"divergence": "kl", "reference": "mean", "steps": 3, "batch_size": 3, "progress": False}
    d = l3d.decompose(model, tokens, 3, rank=2, k=0.5, positions=2, **chosen)
    gradients = [l3d.extract_gradients(model, rows, "kl", "mean") for rows in tokens.split(3)]
    expected = torch.cat([d.encode(each).abs() for each in gradients])  # nothing is drawn
    assert torch.equal(d.impact(model, tokens), expected)
    found = l3d.top_samples(d, model, tokens, n=4)
    assert torch.equal(found.indices, expected.topk(4, dim=0).indices.mT)


def test_the_model_and_the_decomposition_are_left_as_they_were() -> None:
    """Scoring changes no bit and no flag, and records no history for autograd."""
    model, d = net(), decomposition()
    model[0].bias.requires_grad_(False)
    before = [p.detach().clone() for p in (*model.parameters(), *d.parameters())]
    d.evaluate(model, points())
    impact = d.impact(model, points())
    assert all(torch.equal(p, old) for p, old in zip((*model.parameters(), *d.parameters()), before, strict=True))
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert not impact.requires_grad
    assert all(p.grad is None for p in (*model.parameters(), *d.parameters()))


# --- each sample by itself --------------------------------------------------------------------------------------


def coefficients(model: nn.Module, d: Decomposition, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [S, parameters] and coefficients [S, K] by definition, references uniform."""
    g = per_sample(model, x, "uniform")
    return g, g @ flat(d.encoder).mT


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0, 3.0, 1e9])
def test_a_threshold_keeps_by_magnitude_alone(threshold: float) -> None:
    """Error, kept, rates and dead fraction are those of a mask |c| >= threshold over all samples; k is not used."""
    model, d = net(), decomposition(k=1e-9)
    d.threshold = threshold
    g, c = coefficients(model, d, points())
    mask = c.abs() >= threshold
    found = d.evaluate(model, points(), selection="threshold")
    residual = g - (c * mask) @ flat(d.decoder)
    assert found.error == pytest.approx(float(residual.square().sum() / g.square().sum()), rel=1e-10)
    assert found.kept_per_sample == pytest.approx(float(mask.sum() / N))
    assert_relative(found.activation_rate, mask.double().mean(0), 1e-6)
    assert found.dead_fraction == pytest.approx(float((~mask.any(0)).double().mean()))
    assert found.n_samples == N
    if threshold == 1e9:
        assert (found.error, found.dead_fraction) == (1, 1)


def test_a_threshold_does_not_see_the_batch() -> None:
    """By threshold the figures are the same for any size of batch; by batch top-k they are not."""
    model, d = net(), decomposition()
    d.threshold = 0.8
    by_threshold = [d.evaluate(model, points(), selection="threshold", batch_size=size) for size in (2, 7, N)]
    for found in by_threshold[1:]:
        assert found.error == pytest.approx(by_threshold[0].error, rel=1e-12)
        assert torch.equal(found.activation_rate, by_threshold[0].activation_rate)
    by_batch = {d.evaluate(model, points(), batch_size=size).error for size in (2, 7, N)}
    assert len(by_batch) == 3


def test_code_is_the_coefficients_that_reach_the_threshold(tmp_path: Path) -> None:
    """`code` holds exactly the entries of `encode` of at least the threshold, for any samples, after loading too."""
    model, d = net(), decomposition()
    d.threshold = 0.7
    gradients = l3d.extract_gradients(model, points(), reference="uniform")
    encoded = d.encode(gradients)
    code = d.code(gradients)
    assert_relative(code.dense(), torch.where(encoded.abs() >= 0.7, encoded, 0.0), 1e-14)
    assert code.shape == (N, K)
    assert 0 < len(code.values) < N * K
    assert float(code.threshold) == 0.7
    some = torch.tensor([20, 3, 4])
    assert_relative(d.code(gradients.select(some)).dense(), code.dense()[some], 1e-12)
    d.save(tmp_path / "d")
    again = l3d.load(tmp_path / "d").code(gradients)
    assert torch.equal(again.values, code.values)
    assert torch.equal(again.columns, code.columns)
    grads = torch.autograd.grad(code.values.square().sum(), list(d.encoder.parameters()))
    expected = torch.autograd.grad(
        torch.where(encoded.abs() >= 0.7, encoded, 0.0).square().sum(), list(d.encoder.parameters())
    )
    for grad, wanted in zip(grads, expected, strict=True):
        assert_relative(grad, wanted, 1e-12)


def test_a_trained_decomposition_has_a_threshold_that_keeps_about_k() -> None:
    """Selected by its threshold, the training data keeps about as many coefficients per sample as k says."""
    model = net()
    d = l3d.decompose(model, points(64), K, rank=2, k=0.2, steps=80, batch_size=16, reference="mean", progress=False)
    found = d.evaluate(model, points(64), selection="threshold")
    assert 0.6 * 0.2 * K < found.kept_per_sample < 1.6 * 0.2 * K
    assert found.error < 1


def test_without_a_threshold_there_is_no_code() -> None:
    """Before training the threshold is not known: one line says so, from `code` and from `evaluate`."""
    model, d = net(), decomposition()
    gradients = l3d.extract_gradients(model, points(), reference="uniform")
    with pytest.raises(ValueError, match=r"^threshold: not known before training"):
        d.code(gradients)
    with pytest.raises(ValueError, match=r"^threshold: not known before training"):
        d.evaluate(model, points(), selection="threshold")
    d.threshold = 1.0
    other = l3d.extract_gradients(model, points(), params="0.*", reference="uniform")
    with pytest.raises(ValueError, match=r"^gradients: expected those of"):
        d.code(other)


# --- refit ------------------------------------------------------------------------------------------------------


def refitted(model: nn.Module, d: Decomposition, x: Tensor, masks: list[Tensor]) -> float:
    """Replace the coefficients of every sample by torch's least squares on its kept directions: the error."""
    decoder = flat(d.decoder)
    g, mask = per_sample(model, x, "uniform"), torch.cat(masks)
    residual = 0.0
    for s in range(len(x)):
        kept = decoder[mask[s]]
        if len(kept):
            solution = torch.linalg.lstsq(kept.mT, g[s, :, None], driver="gelsd").solution
            residual += float((g[s] - (kept.mT @ solution)[:, 0]).square().sum())
        else:
            residual += float(g[s].square().sum())
    return residual / float(g.square().sum())


def batch_masks(model: nn.Module, d: Decomposition, x: Tensor, k: float) -> list[Tensor]:
    """What batch top-k keeps, batch by batch."""
    masks = []
    for batch in batches(x):
        _, c = coefficients(model, d, batch)
        n = max(1, math.floor(k * c.numel() + 0.5))
        mask = torch.zeros(c.numel(), dtype=torch.bool)
        mask[c.abs().flatten().argsort(descending=True)[:n]] = True
        masks.append(mask.view_as(c))
    return masks


@pytest.mark.parametrize("k", [1e-9, 0.05, 0.2, 0.6, 1.0])
def test_refit_is_least_squares_on_what_is_kept(k: float) -> None:
    """The error is that of torch.linalg.lstsq sample by sample; the choice of subnetworks stays; it is never higher."""
    model, d = net(), decomposition(k=k)
    plain, found = (d.evaluate(model, points(), refit=refit) for refit in (False, True))
    assert found.error == pytest.approx(refitted(model, d, points(), batch_masks(model, d, points(), k)), rel=1e-9)
    assert found.error <= plain.error
    assert torch.equal(found.activation_rate, plain.activation_rate)
    assert found.kept_per_sample == plain.kept_per_sample
    assert found.dead_fraction == plain.dead_fraction


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0, 1e9])
def test_refit_of_what_reaches_a_threshold(threshold: float) -> None:
    """Samples that keep all, some and none are each refitted by themselves."""
    model, d = net(), decomposition()
    d.threshold = threshold
    _, c = coefficients(model, d, points())
    found = d.evaluate(model, points(), selection="threshold", refit=True)
    assert found.error == pytest.approx(refitted(model, d, points(), [c.abs() >= threshold]), rel=1e-9)
    assert found.error <= d.evaluate(model, points(), selection="threshold").error


def copied(amount: float, seed: int = 0) -> Decomposition:
    """A decomposition whose odd directions are the even ones, but for so much of their entries, in both sides."""
    d = decomposition(k=0.7)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in d.parameters():
            noise = torch.randn(parameter[1::2].shape, generator=generator, dtype=torch.float64)
            parameter[1::2] = parameter[::2] + amount * parameter[::2].abs().mean() * noise
    d.normalize_()
    return d


def test_duplicate_directions_do_no_harm_to_refit() -> None:
    """Where two kept directions are the same, any split of their coefficient is a solution: the error is the same."""
    model, d = net(), copied(0.0)
    found = d.evaluate(model, points(), refit=True)
    assert found.error == pytest.approx(refitted(model, d, points(), batch_masks(model, d, points(), 0.7)), rel=1e-8)
    assert found.error <= d.evaluate(model, points()).error


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("amount", [0.0, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2])
def test_nearly_equal_directions_do_no_harm_to_refit_in_float32(amount: float, seed: int) -> None:
    """In float32 directions that cannot be told apart count as one: refit explains no less than without, and no more
    than least squares in float64 can, nor less than it does without the duplicates."""
    d = copied(amount, seed)
    best = d.evaluate(net(), points(), refit=True).error
    worst = copied(0.0, seed).evaluate(net(), points(), refit=True).error  # as if the copies were not there
    model, x = net().float(), points().float()
    narrow = d.float()
    found = narrow.evaluate(model, x, refit=True).error
    assert found <= narrow.evaluate(model, x).error
    assert best - 0.02 <= found <= worst + 0.02


# --- impact -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["uniform", "mean"])
def test_impact_is_the_brute_force_one(reference: str) -> None:
    """|<Vin_k, g_s>| of every sample and subnetwork, in the order of the data."""
    model, d = net(), decomposition(reference=reference)
    expected = torch.cat([(per_sample(model, b, reference) @ flat(d.encoder).mT).abs() for b in batches(points())])
    assert_relative(d.impact(model, points(), n_references=3), expected, 1e-10)
    assert_relative(l3d.impact(d, model, points()), expected, 1e-10)


def test_impact_averages_over_drawn_references() -> None:
    """The mean over many draws nears the mean over every other row of the batch as reference."""
    model, x = net(), points(4)
    d = decomposition(reference="sample", batch_size=4)
    y = model(x)
    encoder = flat(d.encoder)
    rows = []
    for s in range(4):
        others = [gradient(model, (y[s] - y[j].detach()).square().mean()) @ encoder.mT for j in range(4) if j != s]
        rows.append(torch.stack(others).abs().mean(0))
    assert_relative(d.impact(model, x, n_references=600), torch.stack(rows), 0.05)
    assert not torch.equal(d.impact(model, x, n_references=1), d.impact(model, x, n_references=2))
    assert torch.equal(d.impact(model, x), d.impact(model, x))


@pytest.mark.parametrize("n", [1, 4, N])
def test_top_samples_are_those_of_largest_impact(n: int) -> None:
    """For each subnetwork the n samples of largest impact, largest first, by their number in the data."""
    model, d = net(), decomposition(reference="sample")
    impact = d.impact(model, points(), n_references=4)
    top = l3d.top_samples(d, model, points(), n=n, n_references=4)
    assert top.indices.shape == top.impacts.shape == (K, n)
    for k in range(K):
        order = impact[:, k].argsort(descending=True)[:n]
        assert top.indices[k].tolist() == order.tolist()
        assert torch.equal(top.impacts[k], impact[order, k])


@pytest.mark.parametrize("n", [0, -1, N + 1])
def test_more_top_samples_than_there_are_is_refused(n: int) -> None:
    """n out of range names itself and the number of samples."""
    with pytest.raises(ValueError, match=rf"n: expected between 1 and the {N} samples, got {n}"):
        l3d.top_samples(decomposition(), net(), points(), n=n)


# --- after load -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["sample", "mean", "uniform"])
def test_a_loaded_decomposition_gives_the_same_figures(reference: str, tmp_path: Path) -> None:
    """Saved and loaded, a decomposition evaluates to the same bits."""
    model = net()
    d = l3d.decompose(
        model, points(), K, rank=2, k=0.2, reference=reference, steps=10, batch_size=BATCH, seed=3, progress=False
    )
    d.save(tmp_path)
    loaded = l3d.load(tmp_path)
    before, after = d.evaluate(model, points()), loaded.evaluate(model, points())
    assert before.error == after.error
    assert torch.equal(before.activation_rate, after.activation_rate)
    assert torch.equal(d.impact(model, points()), loaded.impact(model, points()))


def absolute_error(output: Tensor, reference: Tensor) -> Tensor:
    return (output - reference).abs().mean(1)


def impostor(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A user's own divergence that happens to be called as a built-in one is."""

    def divergence(output: Tensor, reference: Tensor) -> Tensor:
        return absolute_error(output, reference)

    divergence.__name__ = name
    return divergence


@pytest.mark.parametrize("divergence", [absolute_error, lambda f, y: (f - y).abs().mean(1)], ids=["function", "lambda"])
def test_a_callable_divergence_must_be_given_again(divergence: Any, tmp_path: Path) -> None:
    """A callable is not saved: evaluating without it says so and what to pass; with it the figures are the same."""
    model = net()
    d = l3d.decompose(
        model, points(), K, rank=2, divergence=divergence, steps=5, batch_size=BATCH, progress=False, out=tmp_path
    )
    loaded = l3d.load(tmp_path)
    with pytest.raises(ValueError, match=r"divergence: .* trained with .* not saved; pass divergence=") as error:
        loaded.evaluate(model, points())
    assert "\n" not in str(error.value)
    expected = d.evaluate(model, points(), divergence=divergence)
    assert loaded.evaluate(model, points(), divergence=divergence).error == expected.error


@pytest.mark.parametrize("name", ["mse", "kl"])
def test_a_callable_named_like_a_built_in_is_not_taken_for_it(name: str) -> None:
    """A user's function called mse is not silently replaced by the package's."""
    model, divergence = net(), impostor(name)
    d = l3d.decompose(model, points(), K, rank=2, divergence=divergence, steps=5, batch_size=BATCH, progress=False)
    with pytest.raises(ValueError, match="pass divergence="):
        d.evaluate(model, points())


def test_a_reference_tensor_must_be_given_again() -> None:
    """A tensor of references is not saved: evaluating without it says what to pass."""
    model, x = net(), points(BATCH)
    reference = torch.ones(BATCH, 3, dtype=torch.float64)
    d = l3d.decompose(model, [x], K, rank=2, reference=reference, steps=5, batch_size=BATCH, progress=False)
    with pytest.raises(ValueError, match=r"reference: .* trained with 'tensor'.* not saved; pass reference="):
        d.evaluate(model, x)
    assert 0 < d.evaluate(model, x, reference=reference).error < math.inf


@pytest.mark.parametrize("call", ["impact", "top_samples"])
def test_impact_can_be_had_with_a_callable_divergence(call: str) -> None:
    """Where an error says to pass divergence=, the function that raised it takes it."""
    model = net()
    d = l3d.decompose(model, points(), K, rank=2, divergence=absolute_error, steps=3, batch_size=BATCH, progress=False)
    function = getattr(l3d, call)
    with pytest.raises(ValueError, match="pass divergence="):
        function(d, model, points())
    function(d, model, points(), divergence=absolute_error)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": 0.0}, r"k: "),
        ({"k": 1.5}, r"k: "),
        ({"batch_size": 0}, r"batch_size: "),
        ({"batch_size": -2}, r"batch_size: "),
        ({"divergence": "l2"}, r"divergence: "),
        ({"reference": "median"}, r"reference: "),
        ({"reference": "pair"}, r"reference: 'pair' needs data that yields"),
        ({"backend": "cuda"}, r"backend: "),
        ({"selection": "top"}, r"selection: expected one of batch, threshold, got 'top'"),
        ({"selection": None}, r"selection: "),
    ],
)
def test_bad_arguments_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    """Each argument out of range raises one line that begins with its name."""
    with pytest.raises(ValueError, match=rf"^{message}"):
        decomposition().evaluate(net(), points(), **changes)


def test_another_model_is_refused() -> None:
    """A model without the parameters, or with other shapes, is named and refused."""
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    with pytest.raises(ValueError, match=r"model: '0.weight' has shape \[6, 4\], the decomposition's \[5, 4\]"):
        decomposition().evaluate(other, points())
    with pytest.raises(ValueError, match=r"no parameter matches '2.weight'"):
        decomposition().evaluate(nn.Sequential(nn.Linear(4, 5)).double().eval(), points())


@pytest.mark.parametrize("data", [torch.zeros(0, 4), []], ids=["tensor", "list"])
def test_no_data_is_refused(data: Any) -> None:
    """An evaluation of nothing is an error, not a division by zero."""
    for call in (decomposition().evaluate, decomposition().impact):
        with pytest.raises(ValueError, match=r"data: expected at least one"):
            call(net(), data)


def test_gradients_of_zero_are_refused() -> None:
    """Where every gradient is zero there is no error to give, and the message says why."""
    x = points(BATCH)
    with pytest.raises(ValueError, match=r"data: every gradient is zero"):
        decomposition(reference="pair").evaluate(net(), TensorDataset(x, x))


def test_gradients_that_are_not_finite_are_not_passed_over() -> None:
    """A batch with NaN in its gradients makes the evaluation fail, or the error NaN; it is never left out."""
    model, x = Root().double().eval(), points(28)
    d = l3d.decompose(model, x, 3, rank=2, steps=3, batch_size=BATCH, progress=False)
    assert 0 < d.evaluate(model, x).error < math.inf
    x[9] = 0
    error = math.nan
    with contextlib.suppress(ValueError):
        error = d.evaluate(model, x).error
    assert math.isnan(error)


def test_results_are_shown_in_one_line() -> None:
    """Sizes and scalar figures, never the arrays."""
    rates = torch.tensor([0.0, 0.25, 0.5])
    assert repr(l3d.Evaluation(0.123456, 0.75, rates, 1 / 3, 40)) == (
        "Evaluation(error=0.1235, dead_fraction=0.3333, kept_per_sample=0.75, n_samples=40; "
        "3 subnetworks, median activation_rate 0.25)"
    )
    impacts = torch.tensor([[0.5, 0.25], [4.0, 2.0], [2.0, 1.0]])
    assert repr(l3d.TopSamples(torch.zeros(3, 2, dtype=torch.int64), impacts)) == (
        "TopSamples(3 subnetworks, 2 samples each; largest impact: median 2, max 4)"
    )
