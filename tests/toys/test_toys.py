"""Check that toy models solve their tasks, that their true circuits hold, and that decompositions find them."""

import math
import time
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import l3d
from l3d.api import Decomposition
from l3d.toys import Superposition, Toy, make, one_thread, sparse_features
from l3d.toys.networks import split_scale

from helpers import assert_relative


@cache
def toy(seed: int = 0) -> Toy:
    """The toy of superposition; tests only read it."""
    return make("tms", seed=seed)


def decompose(**changes: Any) -> Decomposition:
    with one_thread():
        return l3d.decompose(toy().model, toy().data, **{**toy().settings, "progress": False, **changes})


def loss(model: Any, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - x).square().mean())


# --- inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, n_features, probability", [(1000, 5, 0.05), (1, 5, 0.05), (300, 40, 0.05), (200, 3, 0.5)])
def test_features_are_sparse_and_never_all_absent(n: int, n_features: int, probability: float) -> None:
    """Exactly n points in [0, 1], none all zero, features present as often as that condition makes them."""
    x = sparse_features(n, n_features, torch.Generator().manual_seed(0), probability)
    assert x.shape == (n, n_features)
    assert x.min() >= 0
    assert x.max() <= 1
    assert x.any(1).all()
    if n >= 200:
        present = (x > 0).double()
        expected = probability / (1 - (1 - probability) ** n_features)
        deviation = math.sqrt(expected / (n * n_features))
        assert abs(float(present.mean()) - expected) < 5 * deviation
        values = x[x > 0].double()
        assert abs(float(values.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / len(values))


def test_features_come_from_the_generator_alone() -> None:
    """The same generator state gives the same bits; the global generator is left alone."""
    state = torch.get_rng_state()
    first, again, other = (sparse_features(50, 5, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(toy().sample(50, torch.Generator().manual_seed(1)), first)


# --- the model --------------------------------------------------------------------------------------------------


def test_a_toy_is_reproducible() -> None:
    """One seed gives one toy, to the bit, whatever the global generator holds; another seed gives another."""
    expected = toy()
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    again = make("tms", seed=0)
    assert torch.get_num_threads() == threads
    assert torch.equal(again.data, expected.data)
    for ours, theirs in zip(again.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours_truth, theirs_truth in zip(again.truth, expected.truth, strict=True):
        assert all(torch.equal(ours_truth[name], theirs_truth[name]) for name in theirs_truth)
    assert not torch.equal(toy(1).data, expected.data)
    assert not torch.equal(toy(1).model.W_in.weight, expected.model.W_in.weight)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_toy_solves_its_task(seed: int) -> None:
    """On fresh points the loss is a fraction of that of predicting the mean, and every feature gets through."""
    x = toy(seed).sample(5000, torch.Generator().manual_seed(9))
    assert loss(toy(seed).model, x) < 0.2 * float((x - x.mean(0)).square().mean())
    one_at_a_time = torch.eye(5)
    with torch.no_grad():
        answer = toy(seed).model(one_at_a_time)
    assert (answer.argmax(1) == torch.arange(5)).all()
    assert answer.diagonal().min() > 0.5


def test_the_toy_is_ready_to_be_decomposed() -> None:
    """It is the paper's: five features, two hidden units, 1000 points, in evaluation mode, with fitting settings."""
    t = toy()
    assert {name: tuple(p.shape) for name, p in t.model.named_parameters()} == {
        "W_in.weight": (2, 5),
        "W_out.weight": (5, 2),
        "W_out.bias": (5,),
    }
    assert t.data.shape == (1000, 5)
    assert not t.model.training
    assert {name: t.settings[name] for name in ("n_subnetworks", "rank", "k")} == {
        "n_subnetworks": 5,
        "rank": 1,
        "k": 0.1,
    }


def test_the_toy_computes_what_it_says() -> None:
    """The forward pass is ReLU(W_out W_in x + b)."""
    model = Superposition(5, 2).double()
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w_in, w_out, bias = model.W_in.weight, model.W_out.weight, model.W_out.bias
    assert_relative(model(x), (x @ w_in.mT @ w_out.mT + bias).clamp_min(0), 1e-12)


@pytest.mark.parametrize("n_features, n_hidden", [(5, 2), (40, 10), (3, 3)])
def test_the_scale_is_split_in_one_way(n_features: int, n_hidden: int) -> None:
    """Whatever M stands between the matrices, splitting keeps the function and W_in W_inᵀ = (n/h) W_outᵀ W_out."""
    draw = torch.Generator().manual_seed(n_features)
    model = Superposition(n_features, n_hidden).double()
    x = torch.randn(9, n_features, generator=draw, dtype=torch.float64)
    before = model(x)
    grams = []
    for _ in range(2):
        between = torch.randn(n_hidden, n_hidden, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            model.W_in.weight.copy_(between @ model.W_in.weight)
            model.W_out.weight.copy_(model.W_out.weight @ between.inverse())
        split_scale(model)
        assert_relative(model(x), before, 1e-9)
        w_in, w_out = model.W_in.weight.detach(), model.W_out.weight.detach()
        assert_relative(w_in @ w_in.mT, n_features / n_hidden * w_out.mT @ w_out, 1e-9)
        grams.append(w_in @ w_in.mT)
    assert_relative(grams[0], grams[1], 1e-9)


def test_an_unknown_toy_is_refused() -> None:
    """A name that is none lists those there are."""
    with pytest.raises(
        ValueError, match=r"toy: expected one of tms, tms_parallel, tms_40_10, tmcs, high_rank, squared, got 'tmx'"
    ):
        make("tmx")


# --- the truth --------------------------------------------------------------------------------------------------


def test_true_circuits_are_the_gradients_of_the_features_gains() -> None:
    """Circuit i is autograd's gradient of W_out[i] . W_in[:, i], what feature i does to its own output."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in toy().model.named_parameters()}
    assert len(toy().truth) == 5
    for i, circuit in enumerate(toy().truth):
        gain = (parameters["W_out.weight"] @ parameters["W_in.weight"])[i, i]
        names = ["W_in.weight", "W_out.weight"]
        assert sorted(circuit) == names
        for name, expected in zip(names, torch.autograd.grad(gain, [parameters[n] for n in names]), strict=True):
            assert_relative(circuit[name], expected, 1e-6)


def planted(circuits: list[int], mixed: float = 0.0) -> Decomposition:
    """A decomposition whose subnetworks are true circuits, mixed with the next one and scaled by −2."""
    t = toy()
    d = Decomposition({name: p.shape for name, p in t.model.named_parameters()}, len(circuits), 2)
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.zero_()
        pieces = dict(d.decoder.items())
        for k, i in enumerate(circuits):
            for name in ("W_in.weight", "W_out.weight"):
                whole = -2 * (t.truth[i][name] + mixed * t.truth[(i + 1) % 5][name])
                u, s, vh = torch.linalg.svd(whole, full_matrices=False)
                pieces[name].left[k] = (u * s).mT[:2]
                pieces[name].right[k] = vh[:2]
    d.normalize_()
    return d


def test_similarity_is_the_cosine_with_every_true_circuit() -> None:
    """Planted circuits score 1 whatever their sign and scale, in any order; a missing one lowers the mean."""
    assert toy().mmcs(planted([3, 1, 4, 0, 2])) == pytest.approx(1, abs=1e-5)
    order = toy().similarity(planted([3, 1, 4, 0, 2])).argmax(1)
    assert order.tolist() == [3, 1, 4, 0, 2]
    t = toy()
    flat = torch.stack([torch.cat([c[name].flatten() for name in c]) for c in t.truth])
    flat = flat / flat.norm(dim=1, keepdim=True)
    assert_relative(t.similarity(planted([2, 2])), (flat @ flat[[2, 2]].mT).abs(), 1e-4)
    mean = float((flat @ flat[[0, 1]].mT).abs().max(1).values.mean())
    assert t.mmcs(planted([0, 1])) == pytest.approx(mean, rel=1e-4)
    assert mean < 0.9


def test_a_subnetwork_that_holds_two_circuits_scores_lower() -> None:
    """Nothing is gained by mixing: half of the next circuit brings the score down to its cosine."""
    pure, mixed = toy().mmcs(planted([0, 1, 2, 3, 4])), toy().mmcs(planted([0, 1, 2, 3, 4], mixed=0.5))
    assert mixed < 0.95 * pure


def test_a_random_decomposition_scores_low() -> None:
    """What is not trained does not find the circuits."""
    d = Decomposition({name: p.shape for name, p in toy().model.named_parameters()}, 5, 1)
    assert toy().mmcs(d) < 0.8


# --- acceptance -------------------------------------------------------------------------------------------------


def test_the_recommended_settings_find_the_circuits() -> None:
    """With the toy's own settings, MMCS reaches .99 and the error does not exceed the published .19."""
    start = time.perf_counter()
    d = decompose()
    seconds = time.perf_counter() - start
    found = d.evaluate(toy().model, toy().data)
    print(f"MMCS {toy().mmcs(d):.4f}, error {found.error:.4f}, {seconds:.2f} s for {d.settings['steps']} steps")
    assert toy().mmcs(d) >= 0.99
    assert found.error <= 0.19
    assert d.evaluate(toy().model, toy().data, n_references=30).error <= 0.19
    assert found.dead_fraction == 0


@pytest.mark.slow
def test_the_published_recipe_gives_the_published_error() -> None:
    """32,000 steps by the paper's recipe reproduce its error of .19 within .02."""
    start = time.perf_counter()
    d = decompose(preset="published", steps=32_000)
    seconds = time.perf_counter() - start
    error = d.evaluate(toy().model, toy().data, n_references=30).error
    print(f"published recipe: error {error:.4f}, MMCS {toy().mmcs(d):.4f}, {seconds:.0f} s")
    assert abs(error - 0.19) <= 0.02
