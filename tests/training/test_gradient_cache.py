"""Cache gradients: same bits read or extracted, what identifies a store, and the choice by measured times."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
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


# --- files of something else, and damaged ones ------------------------------------------------------------------


def stored(folder: Path, identity: str = "one", reads: str = "on") -> Cache:
    """A store of two batches of gradients, which are those of two batches of points; all of it written."""
    each = [l3d.extract_gradients(mlp(), points(seed)[:8]) for seed in (0, 1)]
    store = Cache(folder, {"data": identity}, 2, lambda step: each[step], reads)
    for step in range(2):
        store[step]
    return store


def forget() -> None:
    """Start as a new process does: with no file whose hash is known."""
    cache_module._seen.clear()


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


BATCH = "batch-000000.safetensors"

OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit of the last tensor": (lambda c: flipped(c / BATCH, -1), "does not have the hash"),
    "a bit in the middle": (lambda c: flipped(c / BATCH, (c / BATCH).stat().st_size // 2), ""),
    "another step's file": (
        lambda c: (c / BATCH).write_bytes((c / "batch-000001.safetensors").read_bytes()),
        "holds the gradients of another run or step",
    ),
    "another run's file": (
        lambda c: (c / BATCH).write_bytes((stored(c.with_name("d"), "two").path / BATCH).read_bytes()),
        "holds the gradients of another run or step",
    ),
    "half of it": (lambda c: (c / BATCH).write_bytes((c / BATCH).read_bytes()[:-40]), ""),
    "none": (lambda c: (c / BATCH).write_bytes(b""), "a header of 0 bytes"),
    "a file without a hash": (
        lambda c: (c / BATCH).write_bytes(save({"t0": torch.zeros(2)}, {"gradients": "{}", "holds": ""})),
        "sha256",
    ),
    "tensors under other names": (
        lambda c: (c / BATCH).write_bytes((c / BATCH).read_bytes().replace(b'"t0"', b'"tx"').replace(b'"t1"', b'"t0"')),
        "does not have the hash",
    ),
}


@pytest.mark.parametrize("damage, message", OTHERS.values(), ids=OTHERS)
def test_a_batch_of_anything_else_is_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    """Damaged, swapped or taken from another run: one line with the file's name, in a new process and in this one."""
    store = stored(tmp_path / "c")
    again = stored(tmp_path / "c")
    damage(tmp_path / "c")
    for reader in (store, again):
        with pytest.raises(ValueError, match=rf"^cache: .*c/{BATCH} is damaged \(.*{message}.*\); delete it$"):
            reader.read(0)
        forget()


def test_a_hash_is_checked_once_and_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process hashes each file that it did not write once; then its size and time tell, to the nanosecond."""
    store = stored(tmp_path / "c")
    hashed = []
    original = cache_module._hash
    monkeypatch.setattr(cache_module, "_hash", lambda *given: (hashed.append(1), original(*given))[1])
    for _ in range(3):
        store.read(0), store.read(1)
    assert not hashed  # it wrote them
    forget()
    for _ in range(3):
        store.read(0), store.read(1)
    assert len(hashed) == 2
    found = (tmp_path / "c" / BATCH).stat()
    os.utime(tmp_path / "c" / BATCH, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    for _ in range(3):
        store.read(0), store.read(1)
    assert len(hashed) == 3


BEGIN = """
import sys, time
from pathlib import Path
import torch
import l3d
from small_models import mlp
folder, seed, at = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
data = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
time.sleep(max(0, at - time.time()))
try:
    cache = l3d.GradientCache(folder, reads="on")
    l3d.decompose(mlp(), data, 4, rank=2, k=0.3, steps=12, batch_size=8, callbacks=[], cache=cache).save(sys.argv[4])
    print("trained")
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("seeds", [(0, 1), (1, 1, 0)])
def test_runs_that_start_at_once_do_not_mix(seeds: tuple[int, ...], tmp_path: Path) -> None:
    """On one new folder runs of one data share it, and those of other data are refused or were first."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (Path(l3d.__file__).parents[1], tests / "support")))
    folder, at = tmp_path / "c", str(time.time() + 3)
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN, str(folder), str(seed), at, str(tmp_path / f"run{i}")],
            env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True,
        )
        for i, seed in enumerate(seeds)
    ]  # fmt: skip
    answers = [process.communicate()[0].strip() for process in begun]
    held = {seed for seed, answer in zip(seeds, answers, strict=True) if answer == "trained"}
    assert len(held) == 1
    for i, (seed, answer) in enumerate(zip(seeds, answers, strict=True)):
        if seed in held:
            assert answer == "trained"
            assert same(
                l3d.load(tmp_path / f"run{i}"),
                train(data=points(seed), steps=12, cache=GradientCache(tmp_path / f"own{i}")),
            )
        else:
            assert "holds gradients of another data" in answer


def test_the_store_of_a_run_that_came_first_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another run makes its store between this one's look and its first batch, this one is refused then."""
    look = Cache.check

    def late(store: Cache) -> None:
        look(store)
        if not (tmp_path / "c").exists():
            monkeypatch.setattr(Cache, "check", look)
            stored(tmp_path / "c", "two")

    monkeypatch.setattr(Cache, "check", late)
    mine = Cache(tmp_path / "c", {"data": "one"}, 2, lambda step: l3d.extract_gradients(mlp(), points()[:8]), "on")
    (tmp_path / "c" / BATCH).unlink()  # as if the other run had not come to its first batch yet
    files = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    with pytest.raises(ValueError, match="holds gradients of another data"):
        mine[0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == files
