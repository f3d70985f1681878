"""Save and load to the bit; loading executes nothing, and a broken file is one line of error."""

import ast
import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import l3d
import l3d_kernels
from l3d.api import Decomposition
from l3d.storage.store import read_tensors

TENSORS, HEADER, MANIFEST = "decomposition.safetensors", "decomposition.json", "manifest.json"
WRITTEN = {TENSORS, HEADER, MANIFEST, "README.md"}
SHAPES = {
    "embed.weight": torch.Size([7, 4]),
    "h.0.weight": torch.Size([4, 4]),
    "h.0.bias": torch.Size([4]),
    "conv.weight": torch.Size([3, 2, 3, 3]),
    "temperature": torch.Size([]),
}
RANK = {"h.*": 3, "conv.*": (2, 1, 2, 3), "*": 2}


def make(shapes: Any = None, rank: Any = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decomposition:
    """A decomposition with everything in it that is saved, none of it round."""
    settings = {"k": 0.1, "rank": {"h.*": 3}, "params": ["h.*", "conv.*"], "positions": 3, "seed": seed, "dtype": None}
    generator = torch.Generator().manual_seed(seed)
    d = Decomposition(SHAPES if shapes is None else shapes, 5, RANK if rank is None else rank, settings, generator)
    with torch.no_grad():
        for parameter in d.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    d = d.to(dtype)
    d.history = {"step": [1, 2], "error": [0.1 + 0.2, 1 / 3], "k": [1.0, 0.1]}
    d.timing = {"seconds": 1 / 7, "steps_per_second": 14.000000000000002}
    d.threshold = 0.1 + 1e-17 + 2**-40
    d.restart_errors = [1 / 3, 2 / 3]
    return d


def assert_same(a: Decomposition, b: Decomposition) -> None:
    """Assert that two decompositions agree in every bit and every number."""
    assert list(a.shapes.items()) == list(b.shapes.items())
    assert a.ranks == b.ranks
    assert a.n_subnetworks == b.n_subnetworks
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])
    for field in ("settings", "history", "timing", "restart_errors"):
        assert getattr(a, field) == getattr(b, field), field
    assert a.threshold == b.threshold or (math.isnan(a.threshold) and math.isnan(b.threshold))


# --- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors, shapes, ranks, settings, history, timing and threshold come back to the bit, in their dtype."""
    d = make(dtype=dtype)
    l3d.save(d, tmp_path / "a")
    loaded = l3d.load(tmp_path / "a")
    assert_same(loaded, d)
    assert all(p.requires_grad and p.is_leaf and p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(loaded.subnetwork(2)["conv.weight"], d.subnetwork(2)["conv.weight"])
    loaded.save(str(tmp_path / "b"))
    for name in (TENSORS, HEADER):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("rows", [None, slice(1, 3)], ids=["whole", "rows"])
def test_tensors_are_read_to_the_cpu(rows: slice | None, tmp_path: Path) -> None:
    """A default device, here one without values, does not take part in reading."""
    written = torch.arange(12.0).view(4, 3)
    save_file({"a": written}, tmp_path / TENSORS)
    with torch.device("meta"):
        found = read_tensors(tmp_path / TENSORS, rows)["a"]
    assert torch.equal(found, written[rows or slice(None)])


def test_an_untrained_decomposition_round_trips(tmp_path: Path) -> None:
    """Without history, and with a threshold of NaN, it is saved and comes back."""
    d = Decomposition({"w": torch.Size([3, 2])}, 1, 1)
    d.save(tmp_path)
    assert_same(l3d.load(tmp_path), d)


def test_the_json_is_json(tmp_path: Path) -> None:
    """The header is read by any strict parser: NaN and infinity, which json has no words for, are not in it."""
    d = make()
    d.threshold, d.restart_errors = float("nan"), [math.inf, 0.5]
    d.save(tmp_path)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not json")

    json.loads((tmp_path / HEADER).read_text(), parse_constant=refuse)
    loaded = l3d.load(tmp_path)
    assert math.isnan(loaded.threshold)
    assert not math.isfinite(loaded.restart_errors[0])
    assert loaded.restart_errors[1] == 0.5


@pytest.mark.parametrize(
    "names",
    [
        ["w[0].weight", "w[1].weight"],
        ["a*b", "aXb", "a?b", "w[ab]", "wa"],
        ["größe", "名前", "🙂"],
        ["with space", "slash/es", 'quo"te', "back\\slash", "new\nline"],
        ["__metadata__", "encoder.x.left", "x"],
        ["a.left", "a"],
    ],
    ids=str,
)
def test_names_with_special_characters_round_trip(names: list[str], tmp_path: Path) -> None:
    """Whatever characters parameters' names hold, each comes back with its own rank and tensors."""
    rank = {re.sub(r"[\[*?]", r"[\g<0>]", name): 1 + i % 3 for i, name in enumerate(names)}
    d = make({name: torch.Size([4, 3]) for name in names}, rank)
    assert [d.ranks[name] for name in names] == [(1 + i % 3,) for i in range(len(names))]
    d.save(tmp_path)
    assert_same(l3d.load(tmp_path), d)


class Odd(nn.Module):
    """Parameters whose names are globs for one another."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.ones(3)) for name in ("a*", "ab", "[a]", "a")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weights["a*"] + self.weights["ab"] * x**2 + self.weights["[a]"] * x**3 + self.weights["a"]


def test_evaluation_after_load_takes_the_very_parameters(tmp_path: Path) -> None:
    """Where one parameter's name is a glob for another's, only those that were decomposed are differentiated."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    for pattern, names in (("weights.a[*]", ["weights.a*"]), ("weights.[[]a]", ["weights.[a]"])):
        d = l3d.decompose(Odd(), x, 2, rank=1, k=1.0, params=pattern, steps=40, batch_size=4, callbacks=[])
        assert d.parameter_names == names
        d.save(tmp_path / "run")
        error = l3d.load(tmp_path / "run").evaluate(Odd(), x, n_references=4).error
        assert error == pytest.approx(d.history["error"][-1], abs=0.3)
        assert error < 1


def test_a_trained_decomposition_round_trips(tmp_path: Path) -> None:
    """What decompose returns and what it wrote to `out` are the same."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval()
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    d = l3d.decompose(model, x, 4, rank={"0.*": (2, 2), "*": 1}, steps=12, out=tmp_path / "run", callbacks=[])
    loaded = l3d.load(tmp_path / "run")
    loaded.settings["rank"] = d.settings["rank"]  # json has no tuples
    assert_same(loaded, d)


def test_files_are_readable_as_others_are(tmp_path: Path) -> None:
    """Files get the permissions that the user's umask gives, so that a shared folder can be read."""
    old = os.umask(0o022)
    try:
        make().save(tmp_path / "run")
    finally:
        os.umask(old)
    for name in (TENSORS, HEADER):
        assert stat.S_IMODE((tmp_path / "run" / name).stat().st_mode) == 0o644


# --- nothing is executed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [l3d, l3d_kernels], ids=lambda package: package.__name__)
def test_no_pickle_anywhere(package: Any) -> None:
    """No file imports pickle or its kin, calls torch.load or torch.save, or allows pickles in numpy."""
    files = sorted(Path(package.__file__).parent.rglob("*.py"))
    assert len(files) > 5
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "copyreg"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.partition(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in forbidden, path
                if node.module == "torch":
                    assert not {"load", "save"} & {alias.name for alias in node.names}, path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert not (node.value.id == "torch" and node.attr in ("load", "save")), path
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec"):
                pytest.fail(f"{path} executes text")
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path


# --- broken files -----------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header as parsed."""

    def edit(folder: Path) -> None:
        header = json.loads((folder / HEADER).read_text())
        change(header)
        (folder / HEADER).write_text(json.dumps(header))

    return edit


def truncate(folder: Path, name: str, keep: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(keep * len(data))])


def retensored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return edit


def drop(key: str) -> Callable[[Path], None]:
    return edited(lambda header: header.pop(key))


def put(key: str, value: Any) -> Callable[[Path], None]:
    return edited(lambda header: header.update({key: value}))


BROKEN: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no header": (lambda f: (f / HEADER).unlink(), FileNotFoundError, "no such file"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), FileNotFoundError, "no such file"),
    "empty header": (lambda f: truncate(f, HEADER, 0), ValueError, "JSON"),
    "half a header": (lambda f: truncate(f, HEADER, 0.5), ValueError, "JSON"),
    "bytes for a header": (lambda f: (f / HEADER).write_bytes(b"\xff\xfe\x00"), ValueError, "JSON"),
    "a list for a header": (lambda f: (f / HEADER).write_text("[1]"), ValueError, "JSON object"),
    "empty tensors": (lambda f: truncate(f, TENSORS, 0), ValueError, "safetensors"),
    "half the tensors": (lambda f: truncate(f, TENSORS, 0.5), ValueError, "safetensors"),
    "nearly all tensors": (lambda f: truncate(f, TENSORS, 0.999), ValueError, "safetensors"),
    "bytes for tensors": (lambda f: (f / TENSORS).write_bytes(b"PK" * 50), ValueError, "safetensors"),
    "another format": (put("format", "l3d-decomposition-2"), ValueError, "format"),
    "no format": (drop("format"), ValueError, "format"),
    "no shapes": (drop("shapes"), ValueError, "damaged"),
    "no ranks": (drop("ranks"), ValueError, "damaged"),
    "no K": (drop("n_subnetworks"), ValueError, "damaged"),
    "no settings": (drop("settings"), ValueError, "damaged"),
    "no history": (drop("history"), ValueError, "damaged"),
    "no timing": (drop("timing"), ValueError, "damaged"),
    "no threshold": (drop("threshold"), ValueError, "damaged"),
    "no restart errors": (drop("restart_errors"), ValueError, "damaged"),
    "shapes of another kind": (put("shapes", [1, 2]), ValueError, "damaged"),
    "a shape of words": (put("shapes", {"embed.weight": "ab"}), ValueError, "damaged"),
    "ranks of another kind": (put("ranks", {"embed.weight": 3}), ValueError, "damaged"),
    "K of another kind": (put("n_subnetworks", "five"), ValueError, "damaged"),
    "another K": (put("n_subnetworks", 6), ValueError, "does not belong"),
    "no K at all": (put("n_subnetworks", 0), ValueError, "damaged"),
    "another rank": (edited(lambda h: h["ranks"].update({"h.0.weight": [2]})), ValueError, "does not belong"),
    "another shape": (edited(lambda h: h["shapes"].update({"h.0.bias": [5]})), ValueError, "does not belong"),
    "a rank too large": (edited(lambda h: h["ranks"].update({"h.0.weight": [9]})), ValueError, "damaged"),
    "a parameter more": (edited(lambda h: h["shapes"].update({"more": [5]})), ValueError, "does not belong"),
    "a tensor less": (retensored(lambda t: t.pop("encoder.h.0.bias.vector")), ValueError, "does not belong"),
    "a tensor more": (retensored(lambda t: t.update({"more": torch.zeros(1)})), ValueError, "does not belong"),
    "no tensor at all": (retensored(lambda t: t.clear()), ValueError, "does not belong"),
    "whole numbers": (
        retensored(lambda t: t.update({n: v.long() for n, v in t.items()})),
        ValueError,
        "does not belong",
    ),
    "a decomposition of nothing": (
        lambda f: (put("shapes", {})(f), put("ranks", {})(f), retensored(lambda t: t.clear())(f)),
        ValueError,
        "damaged",
    ),
}


@pytest.mark.filterwarnings("ignore:.*has no manifest")
@pytest.mark.parametrize("damage, kind, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line_of_error(
    damage: Callable[[Path], Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    """Each kind of damage raises ValueError or FileNotFoundError with one line that names the folder.

    With a manifest, every damaged file is named as such; without one, as in older folders, what is wrong in it is told.
    """
    make().save(tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(kind, match=message if kind is FileNotFoundError else "damaged: its SHA-256 is not") as error:
        l3d.load(tmp_path / "run")
    assert str(tmp_path / "run") in str(error.value)
    assert "\n" not in str(error.value)
    (tmp_path / "run" / MANIFEST).unlink()
    with pytest.raises(kind, match=message) as error:
        l3d.load(tmp_path / "run")
    assert type(error.value) is kind
    assert str(tmp_path / "run") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Loading from nowhere says which file was looked for."""
    with pytest.raises(FileNotFoundError, match=r"nowhere.*no such file; expected a folder that l3d wrote"):
        l3d.load(tmp_path / "nowhere")


# --- interrupted writes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interrupted_write_leaves_the_old_file(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If moving a file into its place fails, the old one is whole, and no half-written file is left beside it."""
    make(seed=0).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace, calls = os.replace, []

    def failing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) >= at:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        make(seed=1).save(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(after) == set(before) == WRITTEN
    failed = Path(calls[-1]).name
    assert after[failed] == before[failed]
    if at == 3:  # the new tensors with the old header
        with pytest.raises(ValueError, match=rf"{TENSORS}: damaged|{HEADER}: damaged"):
            l3d.load(tmp_path)
    else:
        assert_same(l3d.load(tmp_path), make(seed=int(at == 4)))


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk fills while a file is written, the old one is whole and the partial one is gone."""
    d = make(seed=0)
    d.save(tmp_path)

    def full(path: Path, *_: Any, **__: Any) -> int:
        path.touch()
        raise OSError("disk full")

    for writer in ("write_bytes", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, writer, full)
            with pytest.raises(OSError, match="disk full"):
                make(seed=0).save(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == WRITTEN
        assert_same(l3d.load(tmp_path), d)


def test_saving_again_replaces_both_files(tmp_path: Path) -> None:
    """A second decomposition saved in the same place is the one that loads, and nothing else is left."""
    make(seed=0).save(tmp_path)
    other = make({"w": torch.Size([3, 4])}, 2, seed=2)
    other.save(tmp_path)
    assert_same(l3d.load(tmp_path), other)
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN


def test_settings_that_json_cannot_hold_are_refused_before_writing(tmp_path: Path) -> None:
    """A setting without a json form fails with the old files in place, both of them."""
    d = make()
    d.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    bad = make(seed=5)
    bad.settings["callback"] = print
    with pytest.raises((TypeError, ValueError)):
        bad.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
