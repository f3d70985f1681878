"""Measure how well circuits are recovered: each measure by hand, the suite and its table, the cache of toys."""

import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import l3d
from l3d.api import Decomposition
from l3d.storage.files import replace_between
from l3d.studies.recovery_suite import EXPERIMENTS, LABELS, Experiment, run_suite, short, to_markdown
from l3d.toys import Network, Superposition, Toy, grouped_features, make, recipes, signed_features
from l3d.toys import cache as cache_module
from l3d.toys.recovery import (
    MEASURES,
    distinct,
    find_columns,
    find_features,
    find_groups,
    find_inputs,
    r_squared,
    similarity,
)

from helpers import assert_relative


@cache
def toy(name: str) -> Toy:
    """A toy of seed 0; tests only read it."""
    return make(name)


def planted(name: str, circuits: list[int], scale: float = -2.0, mixed: float = 0.0, rank: int = 2) -> Decomposition:
    """A decomposition whose subnetworks are true circuits, scaled, with some of the next one mixed in."""
    t = toy(name)
    d = Decomposition({n: p.shape for n, p in t.model.named_parameters()}, len(circuits), rank)
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.zero_()
        pieces = dict(d.decoder.items())
        for k, i in enumerate(circuits):
            for n, circuit in t.truth[i].items():
                whole = scale * (circuit + mixed * t.truth[(i + 1) % len(t.truth)][n])
                u, s, vh = torch.linalg.svd(whole, full_matrices=False)
                pieces[n].left[k] = (u * s).mT[:rank]
                pieces[n].right[k] = vh[:rank]
    d.normalize_()
    return d


# --- which subnetwork belongs to which circuit ------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, expected",
    [
        ([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], 3),
        ([[0.0, 0, 0.1], [0.2, 0, 0], [0, 9, 0]], 3),  # in any order, however small
        ([[1.0, 0.9, 0], [1, 0.9, 0], [0, 0, 1]], 1),  # two share one: neither has its own
        ([[1.0, 0], [1, 0], [1, 0]], 0),
        ([[0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]], 2),  # more subnetworks than circuits
        ([[1.0], [0.5]], 0),  # fewer
        ([[1.0]], 1),
    ],
    ids=str,
)
def test_distinct_counts_what_no_other_has(scores: list[list[float]], expected: int) -> None:
    """A row counts where no other row has its best column."""
    assert distinct(torch.tensor(scores)) == expected


def test_distinct_is_a_count_by_hand() -> None:
    """On random scores it is what a dictionary of the best columns counts, and no permutation changes it."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        scores = torch.rand(7, 6, generator=generator)
        best = [max(range(6), key=row.__getitem__) for row in scores.tolist()]
        expected = sum(best.count(column) == 1 for column in best)
        assert distinct(scores) == expected
        shuffled = scores[torch.randperm(7, generator=generator)][:, torch.randperm(6, generator=generator)]
        assert distinct(shuffled) == expected


@pytest.mark.parametrize("own", [False, True])
def test_similarity_is_the_cosine_by_hand(own: bool) -> None:
    """Over all entries, or those that are not zero in the circuit; the bias, which no circuit is given in, is out."""
    generator = torch.Generator().manual_seed(0)
    d = Decomposition({n: p.shape for n, p in toy("tmcs").model.named_parameters()}, 4, 3, generator=generator)
    found = similarity(toy("tmcs").truth, d, own)
    assert found.shape == (10, 4)
    for i, circuit in enumerate(toy("tmcs").truth):
        for k in range(4):
            subnetwork = d.subnetwork(k)
            t = np.concatenate([circuit[n].double().numpy().ravel() for n in ("W_in.weight", "W_out.weight")])
            v = np.concatenate([subnetwork[n].double().numpy().ravel() for n in ("W_in.weight", "W_out.weight")])
            v = v[t != 0] if own else v
            t = t[t != 0] if own else t
            assert float(found[i, k]) == pytest.approx(abs(t @ v) / np.linalg.norm(t) / np.linalg.norm(v), rel=1e-4)


def test_a_subnetwork_of_zeros_is_like_nothing() -> None:
    """Its similarity is zero, not NaN, over all entries and over the circuit's own."""
    d = planted("tms", [0, 1])
    with torch.no_grad():
        for parameter in d.decoder.parameters():
            parameter[1] = 0
    for own in (False, True):
        scores = similarity(toy("tms").truth, d, own)
        assert torch.equal(scores[:, 1], torch.zeros(5))
        assert float(scores[0, 0]) == pytest.approx(1, abs=1e-5)


# --- features and columns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n", [("tms", 5), ("tmcs", 10)])
@pytest.mark.parametrize("scale", [-2.0, 1e-3])
def test_planted_features_are_all_found(name: str, n: int, scale: float) -> None:
    """The true circuits in any order, of any sign and scale, score one, and each feature has its own."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()
    found = toy(name).recovery(planted(name, order, scale))
    assert found["mmcs"] == pytest.approx(1, abs=1e-5)
    assert found["mmcs_own"] == pytest.approx(1, abs=1e-5)
    assert found["features_found"] == n


def test_a_missing_feature_is_missed() -> None:
    """With one circuit planted twice and another not at all, at most the other three are found."""
    d = planted("tms", [0, 1, 2, 3, 3])
    found = find_features(toy("tms"), d)
    scores = similarity(toy("tms").truth, d)
    best = scores.argmax(1).tolist()
    assert found["features_found"] == sum(best.count(k) == 1 for k in best) < 5
    assert found["mmcs"] == pytest.approx(float((4 + scores[4].max()) / 5), abs=1e-4)
    assert found["mmcs"] < 0.95


def test_own_weights_do_not_see_what_else_a_subnetwork_does() -> None:
    """With half of the next circuit mixed in, the own weights still agree; over all entries they do not."""
    found = find_features(toy("tms"), planted("tms", [0, 1, 2, 3, 4], mixed=0.5))
    assert found["mmcs_own"] == pytest.approx(1, abs=1e-5)
    assert found["mmcs"] < 0.95


def test_true_circuits_of_a_linear_map_are_its_columns_norms() -> None:
    """Circuit i is autograd's gradient of half the squared norm of column i of W_out W_in."""
    parameters = {n: p.detach().double().requires_grad_() for n, p in toy("tmcs").model.named_parameters()}
    names = ["W_in.weight", "W_out.weight"]
    for i, circuit in enumerate(toy("tmcs").truth):
        value = (parameters["W_out.weight"] @ parameters["W_in.weight"])[:, i].square().sum() / 2
        assert sorted(circuit) == names
        for n, expected in zip(names, torch.autograd.grad(value, [parameters[n] for n in names]), strict=True):
            assert_relative(circuit[n], expected, 1e-5)


@pytest.mark.parametrize("scale", [-3.0, 0.01])
def test_planted_columns_are_explained(scale: float) -> None:
    """True circuits give the columns of W_out W_in exactly, and those of A as well as that product does."""
    t = toy("tmcs")
    matrix = t.measure.keywords["matrix"]
    found = find_columns(t, planted("tmcs", list(range(9, -1, -1)), scale), matrix)
    assert found == t.recovery(planted("tmcs", list(range(9, -1, -1)), scale))
    assert found["r2"] == pytest.approx(1, abs=1e-5)
    w_in, w_out = (t.model.get_parameter(f"{n}.weight").detach().double().numpy() for n in ("W_in", "W_out"))
    product, target = w_out @ w_in, matrix.double().numpy()
    residual = 0.0
    for ours, theirs in zip(product.T, target.T, strict=True):
        fit = np.linalg.lstsq(ours[:, None], theirs, rcond=None)[0]
        residual += float(np.square(ours * fit - theirs).sum())
    assert found["r2_task"] == pytest.approx(1 - residual / (target.size * target.var()), rel=1e-5)
    assert found["r2_task"] < 0.95  # ten features in five units cannot be mapped without a loss


def test_wrong_columns_are_not_explained() -> None:
    """Random subnetworks explain less of the columns than the true ones."""
    t = toy("tmcs")
    d = Decomposition({n: p.shape for n, p in t.model.named_parameters()}, 10, 1)
    assert t.recovery(d)["r2"] < 0.8


def test_r_squared_is_one_scale_per_column() -> None:
    """By numpy: each column's least-squares multiple of what was found, against the variance about the one mean."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((4, 6), (10, 1), (3, 3)):
        found = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        target = 1 + torch.rand(rows, columns, generator=generator, dtype=torch.float64)
        residual = 0.0
        for f, t in zip(found.T.numpy(), target.T.numpy(), strict=True):
            residual += np.linalg.lstsq(f[:, None], t, rcond=None)[1].sum()
        expected = 1 - residual / (target.numel() * target.numpy().var())
        assert r_squared(found, target) == pytest.approx(expected, rel=1e-12)


def test_r_squared_of_known_cases() -> None:
    """Multiples of the target are perfect; nothing found explains worse than the mean; it can be below zero."""
    target = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0]])
    assert r_squared(target * torch.tensor([-4.0, 0.25]), target) == pytest.approx(1, abs=1e-6)
    assert r_squared(target.new_zeros(3, 2), target) == pytest.approx(1 - 124 / 28)
    assert r_squared(torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]]), target) == pytest.approx(1 - 89 / 28)


# --- groups and inputs ------------------------------------------------------------------------------------------


def with_rates(weights: Tensor, rates: list[float]) -> Any:
    """What `find_groups` asks of a decomposition: W_in of each subnetwork [K, hidden, features], how often it acts."""
    return SimpleNamespace(
        n_subnetworks=len(weights),
        subnetwork=lambda i: {"W_in.weight": weights[i], "W_out.weight": torch.ones(2, 2)},
        evaluate=lambda model, data: SimpleNamespace(activation_rate=torch.tensor(rates)),
    )


def group_weights(energies: list[list[float]], size: int) -> Tensor:
    """W_in whose squared entries in each group's columns sum to the energies, in a column of the group: [K, 3, F]."""
    weights = torch.zeros(len(energies), 3, size * len(energies[0]))
    for k, row in enumerate(energies):
        for group, energy in enumerate(row):
            weights[k, 1, group * size] = -math.sqrt(energy / 2)
            weights[k, 2, group * size + size - 1] = math.sqrt(energy / 2)
    return weights


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize(
    "energies, rates, groups, purity",
    [
        ([[3.0, 0, 0], [0, 0.1, 0], [0, 0, 7]], [0.1, 0.1, 0.1], 3, 1.0),
        ([[9.1, 0.9, 0], [0, 8.9, 1.1], [0, 0, 7]], [0.1, 0.1, 0.1], 2, (0.91 + 0.89 + 1) / 3),
        ([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [0.1, 0.009, 0.01], 2, 2 / 3),  # the second hardly ever acts
        ([[1.0, 0, 0], [2, 0, 0], [0, 1, 1]], [0.5, 0.5, 0.5], 1, (1 + 0.5 + 0.5) / 3),
        ([[1.0, 1, 2], [0, 0, 0], [0, 0, 0]], [1.0, 1.0, 1.0], 0, (0.25 + 0.25 + 0.5) / 3),  # zeros do no harm
        ([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [0.0, 0.009, 0.0], 0, 0.0),  # none acts
    ],
    ids=["pure", "mixed", "dead", "one group twice", "zeros", "all dead"],
)
def test_groups_are_counted_by_purity(
    energies: list[list[float]], rates: list[float], groups: int, purity: float, size: int
) -> None:
    """A group is found where a live subnetwork has nine tenths of its squared W_in in the group's columns."""
    model = with_rates(group_weights(energies, size), rates)
    found = find_groups(SimpleNamespace(model=None, data=torch.zeros(1, 3 * size)), model, size)
    assert found["groups_found"] == groups
    assert found["purity"] == pytest.approx(purity, rel=1e-5)


@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [1e3, 1.0, 1e-3]], ids=str)
@pytest.mark.parametrize(
    "mixing, expected",
    [
        ([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], 3),
        ([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]], 3),
        ([[1.0, 0.2, 0.1], [0.9, 0.3, 0.1], [0.1, 0.2, 1]], 3),  # relative to each subnetwork's own size
        ([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]], 1),
    ],
    ids=["own", "permuted", "relative", "shared"],
)
def test_inputs_are_counted_by_what_moves_a_subnetwork(
    mixing: list[list[float]], expected: int, scales: list[float]
) -> None:
    """One input at a time goes through [-1, 1]; how large a subnetwork's impacts are altogether does not count."""
    asked = []

    def impact(model: Any, points: Tensor) -> Tensor:
        asked.append(points)
        return points.abs() @ torch.tensor(mixing) * torch.tensor(scales)

    found = find_inputs(SimpleNamespace(model=None, data=torch.zeros(7, 3)), SimpleNamespace(impact=impact))
    assert found == {"inputs_found": expected}
    (points,) = asked
    assert (points.count_nonzero(1) == 1).all()
    for column in points.mT:
        levels = column[column != 0]
        assert_relative(levels.sort().values, np.linspace(-1, 1, len(levels)), 1e-6)
        assert len(levels) * 3 == len(points)


def test_every_figure_has_an_explanation_and_a_label() -> None:
    """What the toys' measures return is explained in MEASURES and has a heading in the table."""
    figures = {*toy("tms").recovery(planted("tms", [0, 1])), *toy("tmcs").recovery(planted("tmcs", [0, 1]))}
    t = toy("high_rank")
    d = Decomposition({n: p.shape for n, p in t.model.named_parameters()}, 10, 1, t.settings)
    figures |= set(t.recovery(d)) | {"inputs_found"}
    assert figures == set(MEASURES)
    assert figures | {"error", "seconds"} == set(LABELS)


# --- inputs of the toys -----------------------------------------------------------------------------------------


def test_grouped_features_are_present_together() -> None:
    """Of each group all features are present or none, some group always is, and values are uniform in [0, 1]."""
    x = grouped_features(2000, 20, torch.Generator().manual_seed(0), size=5)
    assert x.shape == (2000, 20)
    present = (x > 0).view(2000, 4, 5)
    assert torch.equal(present.any(2), present.all(2))
    assert present.any(2).any(1).all()
    expected = 0.05 / (1 - 0.95**4)
    deviation = math.sqrt(expected / (2000 * 4))
    assert abs(float(present.any(2).double().mean()) - expected) < 5 * deviation
    values = x[x > 0].double()
    assert 0 < values.min() < values.max() <= 1
    assert abs(float(values.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / len(values))
    within = x.view(2000, 4, 5)[present.any(2)]
    assert (within.amax(1) - within.amin(1)).min() > 0  # each by itself


def test_signed_features_are_of_both_signs() -> None:
    """Sparse features in [-1, 1], half of them negative, none of the points all zero; drawn by the generator alone."""
    state = torch.get_rng_state()
    x = signed_features(3000, 6, torch.Generator().manual_seed(0))
    assert torch.equal(signed_features(3000, 6, torch.Generator().manual_seed(0)), x)
    assert torch.equal(torch.get_rng_state(), state)
    assert x.shape == (3000, 6)
    assert x.any(1).all()
    assert -1 <= x.min() < -0.9 < 0.9 < x.max() <= 1
    values = x[x != 0].double()
    assert abs(float((values > 0).double().mean()) - 0.5) < 5 * math.sqrt(0.25 / len(values))
    assert abs(float(values.abs().mean()) - 0.5) < 5 * math.sqrt(1 / 12 / len(values))


# --- the cache --------------------------------------------------------------------------------------------------


def build() -> Network:
    return Superposition(3, 2)


class Fit:
    """Trains nothing, but gives other weights every time, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Network:
        self.calls += 1
        network = build().train()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(self.calls))
        return network


def same(a: Network, b: Network) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("L3D_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "toys"


def test_a_toy_is_trained_once(folder: Path) -> None:
    """The second time it comes from its file, the same bits, in evaluation mode; other names and seeds are others."""
    fit = Fit()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = cache_module.trained("tiny", 0, build, fit)
    again = cache_module.trained("tiny", 0, build, fit)
    assert torch.equal(torch.get_rng_state(), state)
    assert fit.calls == 1
    assert again is not first
    assert same(first, again)
    assert not first.training
    assert not again.training
    assert not same(cache_module.trained("tiny", 1, build, fit), first)
    assert not same(cache_module.trained("tiny2", 0, build, fit), first)
    assert fit.calls == 3
    assert len(list(folder.iterdir())) == 3  # and nothing half written


def test_a_cached_toy_is_the_trained_one_to_the_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, data, truth and task are the same from the file as from training, and as those of this test run."""
    first = make("tmcs")
    (file,) = folder.iterdir()
    assert file.name.startswith("tmcs-0-")

    def refuse(*_: Any, **__: Any) -> Network:
        raise AssertionError("trained again")

    monkeypatch.setattr(recipes, "train_network", refuse)
    again = make("tmcs")
    for other in (again, toy("tmcs")):
        assert same(first.model, other.model)
        assert torch.equal(first.data, other.data)
        assert torch.equal(first.measure.keywords["matrix"], other.measure.keywords["matrix"])
        for ours, theirs in zip(first.truth, other.truth, strict=True):
            assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    with pytest.raises(AssertionError, match="trained again"):
        make("tmcs", seed=1)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def of_another_network(path: Path) -> None:
    save_file(Superposition(4, 2).state_dict(), path)


def half_right(path: Path) -> None:
    tensors = load_file(path)
    save_file({**tensors, "W_in.weight": torch.zeros(2, 3), "W_out.weight": torch.zeros(7, 7)}, path)


def one_too_few(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop("W_out.bias")
    save_file(tensors, path)


CORRUPTIONS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no tensors " * 20),
    "zeros": lambda path: path.write_bytes(b"\0" * 500),
    "truncated": truncated,
    "another network's": of_another_network,
    "half right": half_right,
    "one too few": one_too_few,
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_a_damaged_file_is_replaced(corrupt: Callable[[Path], object], folder: Path) -> None:
    """What cannot be read is trained again, nothing of the damaged file is taken, and the next reads the new file."""
    fit = Fit()
    cache_module.trained("tiny", 0, build, fit)
    (path,) = folder.iterdir()
    corrupt(path)
    second = cache_module.trained("tiny", 0, build, fit)
    assert fit.calls == 2
    expected = Fit()
    expected()
    assert same(second, expected())
    assert same(cache_module.trained("tiny", 0, build, fit), second)
    assert fit.calls == 2
    assert list(folder.iterdir()) == [path]


def blocked_by_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.write_text("a file where the cache should be")


def blocked_in_between(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.mkdir()
    folder.write_text("a file where the folder of toys should be")


def blocked_by_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"tiny-0-{cache_module._version()}.safetensors" / "inside").mkdir(parents=True)


def full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        whole(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)


def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize("block", [blocked_by_a_file, blocked_in_between, blocked_by_a_folder, full_disk, read_only])
def test_a_cache_that_cannot_be_written_does_no_harm(
    block: Callable[[Path, pytest.MonkeyPatch], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy is trained every time, and is what it would be; nothing half written stays."""
    block(folder, monkeypatch)
    fit, expected = Fit(), Fit()
    for _ in range(2):
        assert same(cache_module.trained("tiny", 0, build, fit), expected())
    assert fit.calls == 2
    assert not list(folder.parent.parent.rglob("*.partial"))


def test_another_version_of_the_recipes_trains_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file belongs to the version it was trained by; the other version's stays and is found again."""
    fit = Fit()
    first = cache_module.trained("tiny", 0, build, fit)
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_version", lambda: "0123456789ab")
        second = cache_module.trained("tiny", 0, build, fit)
        assert fit.calls == 2
        assert not same(first, second)
    assert same(cache_module.trained("tiny", 0, build, fit), first)
    assert fit.calls == 2


@pytest.mark.parametrize("changed", ["networks.py", "recipes.py", "sampling.py", "torch", "nothing"])
def test_the_version_is_that_of_the_code_and_of_torch(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of any file that decides a toy's weights, or another torch, is another version."""
    here = Path(cache_module.__file__).parent
    for file in ("networks.py", "recipes.py", "sampling.py"):
        shutil.copy(here / file, tmp_path / file)
    monkeypatch.setattr(cache_module, "__file__", str(tmp_path / "cache.py"))
    before = cache_module._version.__wrapped__()
    assert before == cache_module._version()  # of the same files elsewhere
    if changed == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif changed != "nothing":
        with (tmp_path / changed).open("a") as file:
            file.write("\n")
    assert (cache_module._version.__wrapped__() == before) == (changed == "nothing")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$L3D_CACHE if set and not empty, else l3d in $XDG_CACHE_HOME, else in ~/.cache."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("L3D_CACHE", str(tmp_path / "own"))
    assert cache_module._folder() == tmp_path / "own"
    monkeypatch.setenv("L3D_CACHE", "")
    assert cache_module._folder() == tmp_path / "xdg" / "l3d"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("L3D_CACHE")
    assert cache_module._folder() == tmp_path / "home" / ".cache" / "l3d"


# --- the suite --------------------------------------------------------------------------------------------------


def test_a_short_suite_finds_the_circuits() -> None:
    """With 600 steps on seed 0 every feature, column and group is found, and the figures are those of the table."""
    titles = ["tms, `mse`", "tmcs, `mse_published`", "high_rank, rank 1"]
    experiments = [experiment for experiment in EXPERIMENTS if experiment.title in titles]
    said: list[str] = []
    results = run_suite([0], experiments, said.append, steps=600)
    tms, tmcs, high_rank = (results[title] for title in titles)
    assert tms["features_found"] == [5]
    assert tmcs["features_found"] == [10]
    assert high_rank["groups_found"] == [5]
    assert tms["mmcs_own"][0] >= 0.97
    assert tmcs["mmcs_own"][0] >= 0.97
    assert tms["error"][0] < 0.25
    assert high_rank["purity"][0] > 0.9
    assert [line.split(", seed 0: ")[0] for line in said] == titles
    table = to_markdown(results, experiments).splitlines()
    assert len(table) == 2 + sum(map(len, results.values()))
    assert all(line.count("|") == 6 for line in table)


def test_the_suite_passes_on_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiment's arguments go before the toy's, the caller's before those; every seed is another run."""
    asked = []
    original = l3d.decompose

    def decompose(model: Any, data: Tensor, **arguments: Any) -> Decomposition:
        asked.append(arguments)
        return original(model, data, **arguments)

    monkeypatch.setattr(l3d, "decompose", decompose)
    experiment = Experiment("one", "tmcs", {}, {"n_subnetworks": 3, "steps": 10})
    results = run_suite([0], [experiment], lambda _: None, steps=2, n_restarts=1)
    (arguments,) = asked
    expected = {"seed": 0, "steps": 2, "n_restarts": 1, "n_subnetworks": 3, "divergence": "mse_published", "k": 0.1}
    assert {name: arguments[name] for name in expected} == expected
    assert set(results["one"]) == {"error", "mmcs", "mmcs_own", "features_found", "r2", "r2_task", "seconds"}
    assert all(len(values) == 1 and math.isfinite(values[0]) for values in results["one"].values())
    assert run_suite([], [experiment]) == {"one": {}}


def test_the_table_of_a_result_made_by_hand() -> None:
    """One line per figure: what was published, the median, and the range over seeds; what was not run is not in it."""
    experiments = [
        Experiment("first", "tms", {"error": ".19", "r2": ".5"}),
        Experiment("not run", "tms", {"error": ".1"}),
        Experiment("second", "squared", {}, {"n_subnetworks": 3}),
        Experiment("third", "squared"),
    ]
    results = {
        "first": {"error": [0.2, 0.1873, 0.3], "features_found": [5, 4, 5, 5], "seconds": [12.34]},
        "second": {"error": [0.5, 0.25], "inputs_found": [3, 2]},
        "third": {"inputs_found": [5, 3]},
        "unknown": {"error": [1.0]},
    }
    assert to_markdown(results, experiments).splitlines() == [
        "| toy | figure | published | median | over seeds |",
        "|---|---|---|---|---|",
        "| first | error | .19 | .200 | .187 to .300 |",
        "| first | features found |  | 5 | 4 to 5 |",
        "| first | s |  | 12.3 | 12.3 to 12.3 |",
        "| second | error |  | .375 | .250 to .500 |",
        "| third | inputs found |  | 4 | 3 to 5 |",
    ]
    assert to_markdown(results, experiments).endswith("|\n")


@pytest.mark.parametrize(
    "value, expected",
    [
        (0, "0"),
        (5.0, "5"),
        (1.0, "1"),
        (0.5, ".500"),
        (0.0004, ".000"),
        (-0.25, "-.250"),
        (12.34, "12.3"),
        (250.4, "250"),
    ],
)
def test_figures_are_short(value: float, expected: str) -> None:
    """Whole numbers as they are, fractions to three places without the leading zero, others to three digits."""
    assert short(value) == expected


# --- text between two lines -------------------------------------------------------------------------------------

MARKS = ("<!-- toys -->", "<!-- /toys -->")
TEXT = "# Title\n\n<!-- toys -->\nold\nlines\n<!-- /toys -->\n\nσ ≈ 1, after\n"


def test_text_between_two_lines_is_replaced(tmp_path: Path) -> None:
    """Only what stands between changes; a second time, and with nothing in between, it works as well."""
    path = tmp_path / "README.md"
    path.write_text(TEXT, encoding="utf-8")
    for new in ("| a ‖ b |\n", "", "one\ntwo\n", "one\ntwo\n"):
        assert replace_between(path, MARKS, new) == path
        expected = f"# Title\n\n<!-- toys -->\n{new}<!-- /toys -->\n\nσ ≈ 1, after\n"
        assert path.read_text(encoding="utf-8") == expected
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_only_the_first_pair_of_lines_counts(tmp_path: Path) -> None:
    """What stands between a later pair is left alone."""
    path = tmp_path / "a.md"
    path.write_text(TEXT + TEXT, encoding="utf-8")
    replace_between(path, MARKS, "new\n")
    assert path.read_text(encoding="utf-8") == TEXT.replace("old\nlines\n", "new\n") + TEXT


@pytest.mark.parametrize(
    "text",
    ["", "# Title\n", "<!-- toys -->\n", "<!-- /toys -->\n", "<!-- /toys -->\nold\n<!-- toys -->\n"],
    ids=["empty", "neither", "no end", "no beginning", "the wrong way round"],
)
@pytest.mark.parametrize("new", ["new\n", None])
def test_a_text_without_the_lines_is_refused_and_left_alone(text: str, new: str | None, tmp_path: Path) -> None:
    """The error names the file and the lines; None looks for them, and changes nothing."""
    path = tmp_path / "a.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.md: expected the marker lines <!-- toys --> and <!-- /toys -->") as error:
        replace_between(path, MARKS, new)
    assert "\n" not in str(error.value)
    assert path.read_text() == text


def test_looking_for_the_lines_changes_nothing(tmp_path: Path) -> None:
    """With None the file is not written, and a file that is not there is an error either way."""
    path = tmp_path / "a.md"
    path.write_text(TEXT, encoding="utf-8")
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert replace_between(path, MARKS, None) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    for new in (None, "new\n"):
        with pytest.raises(FileNotFoundError, match=r"b\.md: no such file"):
            replace_between(tmp_path / "b.md", MARKS, new)
    assert not (tmp_path / "b.md").exists()
