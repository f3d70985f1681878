"""Cache gradients: same bits read or extracted, what identifies a store, and the choice by measured times."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import l3d
from l3d import GradientCache
from l3d.api import Decomposition
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Dense, Gradients, Rows
from l3d.training import gradient_cache as cache_module
from l3d.training.gradient_cache import Cache, pack, unpack

from helpers import Root
from small_models import mlp

ARGUMENTS: dict[str, Any] = {"n_subnetworks": 4, "rank": 2, "k": 0.3, "steps": 23, "batch_size": 8, "callbacks": []}


def points(seed: int = 0) -> Tensor:
    return torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))


def train(**changes: Any) -> Decomposition:
    chosen = {"model": mlp(), "data": points(), **ARGUMENTS, **changes}
    return l3d.decompose(chosen.pop("model"), chosen.pop("data"), **chosen)


def same(a: Decomposition, b: Decomposition) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("n_references", [1, 2])
def test_read_or_extracted_a_run_ends_in_the_same_bits(n_references: int, tmp_path: Path) -> None:
    """Whether batches are read is a question of time alone; 23 steps go through 5 or 10 batches repeatedly."""
    runs = [train(cache=GradientCache(tmp_path / reads, n_references, reads)) for reads in ("on", "off")]
    runs.append(train(cache=GradientCache(tmp_path / "auto", n_references)))
    runs.append(train(cache=GradientCache(tmp_path / "on", n_references, "on")))  # from a full store
    assert all(same(run, runs[0]) for run in runs[1:])
    assert len(list((tmp_path / "on").glob("batch-*"))) == 5 * n_references
    assert not (tmp_path / "off").exists()
    assert not list(tmp_path.rglob("*.partial"))
    history = runs[0].history["error"]
    assert len(history) == 23
    assert same(
        train(steps=5), train(steps=5, cache=GradientCache(tmp_path / "first", reads="on"))
    )  # the first epoch is as ever


def test_a_full_store_is_read_and_nothing_extracted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep over K, rank, k and steps reads the first run's store; the check before a run goes its own way."""
    train(cache=GradientCache(tmp_path, reads="on"), steps=5)
    calls = []
    original = l3d.training.run.Run.extract
    monkeypatch.setattr(l3d.training.run.Run, "extract", lambda run, step: (calls.append(step), original(run, step))[1])
    for changes in ({"n_subnetworks": 7}, {"rank": 1}, {"k": 0.9}, {"lr": 0.01, "steps": 30}):
        train(cache=GradientCache(tmp_path, reads="on"), **changes)
    assert calls == [0] * 4  # once in each run, to see that the store is not stale


@pytest.mark.parametrize("reads", ["on", "auto"])
def test_an_interrupted_run_goes_on_to_the_same_bits(reads: str, tmp_path: Path) -> None:
    """Resumed in the midst of the first epoch, where the store is half full, and later."""
    whole = train(cache=GradientCache(tmp_path / "whole", reads=reads), out=tmp_path / "a", checkpoint_every=3)
    for at in (4, 14):
        original = l3d.training.run.Run.take_step

        def stop(run: Any, gradients: Gradients, at: int = at, step: Callable = original) -> bool:
            if run.step == at:
                raise KeyboardInterrupt
            return step(run, gradients)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(l3d.training.run.Run, "take_step", stop)
            out = {"cache": GradientCache(tmp_path / f"cache{at}", reads=reads), "out": tmp_path / f"run{at}"}
            with pytest.raises(KeyboardInterrupt):
                train(checkpoint_every=3, **out)
        assert same(train(checkpoint_every=3, existing="resume", **out), whole)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model": mlp(1)}, "model"),
        ({"data": points(1)}, "data"),
        ({"params": "0.weight"}, "params"),
        ({"divergence": "mse_published"}, "divergence"),
        ({"reference": "mean"}, "reference"),
        ({"reference": torch.zeros(3)}, "reference"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 10}, "batch_size"),
        ({"dtype": "float64"}, "dtype"),
        ({"n_references": 2}, "n_references"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_store_of_anything_else_is_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Whatever decides a gradient identifies the store, and the refusal names it; nothing of the run is written."""
    train(cache=GradientCache(tmp_path / "c", reads="on"), steps=2)
    others = {name: value for name, value in changes.items() if name != "n_references"}
    cache = GradientCache(tmp_path / "c", changes.get("n_references", 1))
    with pytest.raises(ValueError, match=rf"^cache: .* holds gradients of another {named};"):
        train(cache=cache, out=tmp_path / "run", **others)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reads", ["auto", "on"])
def test_changed_code_behind_the_same_weights_is_noticed(reads: str, tmp_path: Path) -> None:
    """A stored batch is compared with the extracted one: all that are timed, or the first that is read."""

    class Scaled(nn.Linear):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    torch.manual_seed(0)
    model = Scaled(4, 3)
    train(model=model, cache=GradientCache(tmp_path, reads="on"), steps=2)
    model.scale = 1.5
    with pytest.raises(ValueError, match=r"batch-000000\.safetensors differs from the gradients extracted now"):
        train(model=model, cache=GradientCache(tmp_path, reads=reads), steps=2)


def test_what_cannot_be_identified_is_refused(tmp_path: Path) -> None:
    """Streams, callables, foreign folders, files and damaged batches, each with one line."""
    for changes, message in (
        ({"data": list(points().split(8))}, "cache: needs data whose rows can be counted"),
        ({"divergence": lambda f, y: (f - y).square().sum(1)}, "cache: needs a divergence with a name"),
    ):
        with pytest.raises(ValueError, match=message):
            train(**{"cache": tmp_path / "c", **changes})
    assert not (tmp_path / "c").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and no store of gradients"):
        train(cache=tmp_path / "other")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        train(cache=tmp_path / "other" / "mine.txt")
    train(cache=GradientCache(tmp_path / "c", reads="on"), steps=2)
    (tmp_path / "c" / "batch-000001.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"batch-000001\.safetensors is damaged"):
        train(cache=GradientCache(tmp_path / "c", reads="on"), steps=2)


def test_datasets_are_identified_by_their_rows(tmp_path: Path) -> None:
    """A Dataset of other rows is refused, one of the same rows is taken."""
    train(data=TensorDataset(points()), cache=GradientCache(tmp_path, reads="on"), steps=2)
    train(data=TensorDataset(points()), cache=GradientCache(tmp_path, reads="on"), steps=2)
    with pytest.raises(ValueError, match="another data"):
        train(data=TensorDataset(points(1)), cache=tmp_path, steps=2)


def test_everything_comes_back_and_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    """Rows of numbers and of indices, dense parts, parameters without parts; two layers' one input is one tensor."""
    x, dy = torch.randn(2, 3, 4), torch.randn(4, 3, 5)
    parts = {
        "q": [Rows(x, dy, 1)],
        "k": [Rows(x, 2 * dy, 0)],
        "table": [Rows(torch.randint(7, (2, 3)), dy, 0), Rows(x, dy, 1)],
        "bias": [Dense(torch.randn(8, 5)[::2])],
        "unused": [],
    }
    shapes = {name: torch.Size(s) for name, s in {"q": (5, 4), "k": (4, 5), "table": (5, 4), "bias": (5,)}.items()}
    given = Gradients(parts, shapes | {"unused": torch.Size([2])}, 4, torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
    (tmp_path / "one.safetensors").write_bytes(pack(given))
    again = unpack(tmp_path / "one.safetensors")
    assert (again.shapes, again.n_samples, again.dtype) == (given.shapes, 4, torch.float32)
    for (name, a), (other, b) in zip(given.tensors(), again.tensors(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert [getattr(p, "x_axis", None) for each in again.parts.values() for p in each] == [1, 0, 0, 1, None]
    assert sum(t.numel() for t in load_file(tmp_path / "one.safetensors").values()) == 24 + 2 * 60 + 6 + 20


def test_a_convolution_is_stored_as_the_smaller_of_factors_and_gradient(tmp_path: Path) -> None:
    """A 3x3 kernel over 12x12 pixels: the gradient, 54 numbers a sample, not factors of thousands."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 3))
    train(model=model, data=torch.randn(16, 3, 12, 12), cache=GradientCache(tmp_path, reads="on"), steps=2)
    stored = unpack(tmp_path / "batch-000000.safetensors")
    assert [type(part) for part in stored.parts["0.weight"]] == [Dense]
    assert [type(part) for part in stored.parts["3.weight"]] == [Rows]
    assert sum(t.numel() for name, t in stored.tensors() if name == "0.weight") == 8 * 54


@pytest.mark.parametrize("slow, reading", [("extract", True), ("read", False)])
def test_the_faster_way_is_measured(
    slow: str, reading: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a clock that only slow work moves: the first batches decide, it is said, and a loser's store stays small."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr("l3d.gradients.ahead.MOST", 1)
    original, read = Extractor.__call__, Cache.read

    def extract(extractor: Extractor, *given: Any) -> Gradients:
        now[0] += 1.0 if slow == "extract" else 0.25
        return original(extractor, *given)

    def slowly(store: Cache, index: int) -> Gradients:
        now[0] += 0.5
        return read(store, index)

    monkeypatch.setattr(Extractor, "__call__", extract)
    monkeypatch.setattr(Cache, "read", slowly)
    train(cache=tmp_path, callbacks=None)
    words = "0.5000 s to read; reading" if reading else "0.2500 s to extract, 0.5000 s to read; extracting"
    assert words in capsys.readouterr().err
    assert len(list(tmp_path.glob("batch-*"))) == (5 if reading else cache_module.TRIALS + 1)


def test_bad_input_leaves_no_store(tmp_path: Path) -> None:
    """A first batch that is refused is refused before the store is made."""
    with pytest.raises(ValueError, match="gradients: NaN or infinity"):
        train(model=Root(), data=torch.zeros(16, 4), cache=tmp_path / "c")


def test_a_control_neither_reads_shuffled_gradients_for_others_nor_theirs_as_they_are(tmp_path: Path) -> None:
    """A store holds what was extracted: a shuffled run and a plain one share it, and end as without it."""
    for first in (True, False):  # each writes what the other then reads
        store = {"cache": GradientCache(tmp_path / str(first), reads="on"), "steps": 5}
        for shuffle in (first, not first):
            gradients = l3d.GradientOptions(shuffle)
            assert same(train(steps=5, gradients=gradients), train(**store, gradients=gradients))
