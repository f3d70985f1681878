"""Read JSON by its schema: right types, finite numbers, ranges and lengths, within bounds of memory and time."""

import ast
import gc
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import l3d
from l3d.api import Decomposition
from l3d.decomposition.directions import resolve_ranks
from l3d.storage import schema
from l3d.storage.files import MARGIN, create_text, read_json
from l3d.storage.run_folder import RunFolder
from l3d.storage.schema import NUMBER, Fixed, Number, check, whole

SCHEMA = {
    "count": whole(1), "share?": (None, Number(0, 1)), "names?": [str], "rows?": {str: [NUMBER]},
    "pair?": Fixed(str, NUMBER), "each?": [{"at": whole()}],
}  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [
        {"count": 1},
        {"count": 2**62, "share": None, "unknown": [object]},
        {"count": 3, "share": 1, "names": [], "rows": {}, "each": []},
        {"count": 3, "share": 0.5, "names": ["a"], "rows": {"a": [1, -0.5]}, "pair": ["a", 1], "each": [{"at": 0}]},
    ],
    ids=repr,
)
def test_values_that_fit_pass(value: Any) -> None:
    """Bounds are included, null where it may be, fields that no schema names, and lists of none."""
    check(value, SCHEMA, "file")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 0}, "file: count: expected a whole number from 1, got 0"),
        ({"count": 1.0}, "file: count: expected a whole number from 1, got 1.0"),
        ({"count": True}, "file: count: expected a whole number from 1, got True"),
        ({"count": "1"}, "file: count: expected a whole number from 1, got '1'"),
        ({"count": 2**63}, "file: count: expected a whole number from 1, got 9223372036854775808"),
        ({"share": 1.5}, "file: share: expected a number from 0 to 1, got 1.5"),
        ({"share": float("nan")}, "file: share: expected a number from 0 to 1, got nan"),
        ({"names": "ab"}, "file: names: expected a list of texts, got 'ab'"),
        ({"names": [1]}, "file: names: expected a list of texts"),
        ({"rows": []}, "file: rows: expected named values, got []"),
        ({"rows": {"a": [1, float("inf")]}}, "file: rows: a: expected a list of numbers"),
        ({"rows": {"a": [10**400]}}, "file: rows: a: expected a list of numbers"),
        ({"rows": {"a\nb": [None]}}, "file: rows: a b: expected a list of numbers"),
        ({"pair": ["a"]}, "file: pair: expected a list of 2 values, got ['a']"),
        ({"pair": ["a", "b"]}, "file: pair 1: expected a number, got 'b'"),
        ({"each": [{"at": 0}, {}]}, "file: each 1: at: missing"),
        ({"each": [3]}, "file: each 0: expected named values, got 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    """Wrong types, numbers out of range or not finite, and lengths: one line with the field's name."""
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        check({"count": 1, **change}, SCHEMA, "file")
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "empty"),
        (b"{", "Expecting"),
        (b"\xff\xfe{}", "codec can't decode"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b'{"a": -Infinity}', "-Infinity is not a finite number"),
        (b'{"a": [1e999]}', "1e999 is not a finite number"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is given twice"),
        (b'{"a": ' + b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"1" * 5000 + b"}", "limit"),
        (b'{"a": [' + b"[]," * 3_000_000 + b"1]}", "it would fill the memory"),
        (b'{"a": [' + b"{}," * 2_000_000 + b"1]}", "it would fill the memory"),
        (b'{"a": [' + b"1," * 6_000_000 + b"1]}", "it would fill the memory"),
        ('{"a": "🙂'.encode() + b"x" * 40_000_000 + b'"}', "it would fill the memory"),
    ],
    ids=["empty", "half", "not UTF-8", "NaN", "infinity", "too large a number", "twice", "deep", "digits", "lists",
         "objects", "numbers", "wide text"],
)  # fmt: skip
def test_what_json_may_not_hold(content: bytes, message: str, tmp_path: Path) -> None:
    """One line with the file's name, and no more memory than the file and the margin."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"a\.json: not readable as JSON \(.*{message}") as refusal:
            read_json(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(content) + MARGIN
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refusal.value)


def test_large_files_of_plain_content_are_read(tmp_path: Path) -> None:
    """Ten megabytes of text, and a hundred thousand numbers, are no bomb."""
    content = {"text": "x" * 10_000_000, "numbers": [i / 7 for i in range(100_000)]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert read_json(tmp_path / "a.json") == content


def described(**changes: Any) -> dict[str, Any]:
    place = {"row": 3, "position": 5, "first": 4, "tokens": [7, 8]}
    found = {"kind": "text", "entries": "tokens", "moved": "probability", "n_rows": 9, "tokens": {"7": "a", "8": "b"}}
    return {**found, "subnetworks": [{"impact": 0.5, "raised": [[7, 0.25]], "top": [place | changes]}]}


@pytest.mark.parametrize(
    "value, message",
    [
        (described(position=6), "top: expected the text of the token at its position"),
        (described(position=3), "top: expected the text of the token at its position"),
        (described(tokens=[7, 9]), "top: expected the text of the token at its position"),
        (described(row=-1), "top 0: row: expected a whole number from 0, got -1"),
        (described() | {"kind": "point", "entries": "outputs", "rows": {}}, "a point of one length"),
        (described() | {"kind": "point", "entries": "outputs", "rows": {"3": {"point": []}}}, "a point of one length"),
        ({"kind": "text"}, "entries: missing"),
    ],
)
def test_descriptions_hold_what_they_mention(value: Any, message: str) -> None:
    """A row, a token or a position that the file does not hold is refused before a page is made of it."""
    schema.check_subnetworks(described(), "file")
    with pytest.raises(ValueError, match=rf"^file: .*{message}"):
        schema.check_subnetworks(value, "file")


def refused(path: Path) -> None:
    """Read a file that is refused."""
    with pytest.raises(ValueError, match="is given twice"):
        read_json(path)


def seconds(act: Callable[[], Any]) -> float:
    """Return the least time of three."""
    times = []
    for _ in range(3):
        gc.collect()
        gc.disable()  # it looks at all objects again and again while a large file is read
        started = time.process_time()
        act()
        times.append(time.process_time() - started)
        gc.enable()
    return min(times)


@pytest.mark.parametrize("what", ["ranks", "schema", "json", "a name twice", "load"])
def test_time_grows_with_the_number_of_names(what: str, tmp_path: Path) -> None:
    """Ten times the names take about ten times as long; with each tried on each other it would be a hundred."""
    sizes = (40, 400) if what == "load" else (5000, 50_000)

    def act(n: int) -> Callable[[], Any]:
        shapes = {f"layers.{i}.weight": torch.Size([2, 2]) for i in range(n)}
        if what == "ranks":
            return lambda: resolve_ranks(dict.fromkeys(shapes, 1), shapes)
        header: dict[str, Any] = {"n_subnetworks": 1, "shapes": {name: [2, 2] for name in shapes}}
        header |= {"ranks": {name: [1] for name in shapes}, "settings": {}, "history": {}, "timing": {}}
        header |= {"threshold": None, "restart_errors": []}
        if what == "schema":
            return lambda: schema.check_decomposition(header, "file")
        path = tmp_path / str(n)
        if what == "json":
            path.write_text(json.dumps(header))
            return lambda: read_json(path)
        if what == "a name twice":
            path.write_text("{" + "".join(f'"{name}": 1, ' for name in shapes) + f'"{[*shapes][-1]}": 2}}')
            return lambda: refused(path)
        Decomposition(shapes, 1, 1).save(path)
        return lambda: l3d.load(path)

    few, many = (seconds(act(n)) for n in sizes)
    assert many < 60 * few


# --- links ------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, Any] = {"n_subnetworks": 2, "rank": 1, "steps": 4, "callbacks": []}


def run(folder: Path, **changed: Any) -> Decomposition:
    torch.manual_seed(0)
    return l3d.decompose(torch.nn.Linear(4, 3), torch.randn(20, 4), out=folder, **ARGUMENTS | changed)


def outside(tmp_path: Path) -> dict[str, Path]:
    """Return what links may lead to: a folder of somebody's checkpoints and a file."""
    (tmp_path / "else" / "step000000001").mkdir(parents=True)
    (tmp_path / "else" / "step000000001" / "precious").write_text("x")
    return {"folder": tmp_path / "else", "file": tmp_path / "else" / "step000000001" / "precious"}


@pytest.mark.parametrize("existing", ["overwrite", "resume"])
@pytest.mark.parametrize(
    "name, kind",
    [
        ("checkpoints", "folder"),
        ("tensorboard", "folder"),
        ("wandb", "folder"),
        ("metrics.json", "file"),
        ("checkpoints/step000000009", "folder"),
        ("checkpoints/step000000004/state.json", "file"),
        ("notes", "nothing"),
        ("round", "loop"),
    ],
)
def test_links_out_of_a_run_folder_are_refused(name: str, kind: str, existing: str, tmp_path: Path) -> None:
    """Whatever is linked, and whether or not it is there: one line, nothing deleted, nothing written."""
    run(tmp_path / "run")
    targets = outside(tmp_path) | {"nothing": tmp_path / "nothing", "loop": tmp_path / "loop"}
    targets["loop"].symlink_to(targets["loop"])
    link = tmp_path / "run" / name
    link.rename(tmp_path / "moved") if link.exists() else None
    link.symlink_to(targets[kind])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        (ValueError, FileNotFoundError), match=rf"{name}: a link to .*, outside the folder|nothing to resume"
    ):
        run(tmp_path / "run", existing=existing)
    assert sorted(tmp_path.rglob("*")) == before
    assert targets["file"].read_text() == "x"


@pytest.mark.parametrize("existing", ["overwrite", "resume"])
@pytest.mark.parametrize("name", ["checkpoints", "metrics.json", "latest", "tensorboard"])
def test_links_within_a_run_folder_stay_within(name: str, existing: str, tmp_path: Path) -> None:
    """A run goes on through a link to the folder's own inside; overwriting deletes the link alone."""
    whole = run(tmp_path / "run")
    (tmp_path / "run" / "own").mkdir()
    (tmp_path / "run" / "own" / "mine").write_text("x")
    if name == "checkpoints":
        (tmp_path / "run" / name).rename(tmp_path / "run" / "own" / name)
        (tmp_path / "run" / name).symlink_to(Path("own", name))
    else:
        (tmp_path / "run" / name).symlink_to(Path("own", "mine") if name == "metrics.json" else "own")
    again = run(tmp_path / "run", existing=existing)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    assert (tmp_path / "run" / "own" / "mine").read_text() == "x"
    if name == "checkpoints" and existing == "overwrite":
        assert not (tmp_path / "run" / name).is_symlink()


def test_a_new_text_file_is_created_once(tmp_path: Path) -> None:
    """The second to create a file gets False and changes nothing, with hard links and without."""
    assert create_text(tmp_path / "a", "first")
    assert not create_text(tmp_path / "a", "second")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("not supported")))
        assert create_text(tmp_path / "b", "first")
        assert not create_text(tmp_path / "b", "second")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "first", "b": "first"}


def test_a_folder_that_is_filled_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the claim another process may have made a run there: it is looked at once more."""
    from l3d.storage import run_folder

    def claim_late(folder: Path, claim: Callable[[Path], None] = run_folder.claim) -> None:
        claim(folder)
        (folder / "theirs").write_text("x")

    monkeypatch.setattr(run_folder, "claim", claim_late)
    with pytest.raises(ValueError, match="is not empty"):
        RunFolder.open(tmp_path / "run", overwrite=False, resume=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["theirs"]


# --- one room ---------------------------------------------------------------------------------------------------

READERS = {
    "storage/files.py", "storage/store.py", "storage/yaml_text.py",  # what l3d writes, and settings
    "data/readers.py",  # arrays of the user's own, below storage
    "training/gradient_cache.py", "toys/cache.py",  # safetensors with a hash of their own, after store.check_header
}  # fmt: skip
PARSERS = ("json.load", "np.load", "load_file", "safe_open", "yaml.safe_load", "yaml.load", "zipfile.ZipFile")


def test_one_room_reads_files() -> None:
    """No other file parses JSON, YAML, safetensors or arrays from disk; json.loads of a text of one's own is let be."""
    root = Path(l3d.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in PARSERS or (name == "json.loads" and "read_" in ast.unparse(node)):
                found.add(path.relative_to(root).as_posix())
    assert found <= READERS
