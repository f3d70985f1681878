"""Name the damaged file of a decomposition or checkpoint; load folders without a manifest with a warning."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import l3d
from l3d.api import Decomposition
from l3d.storage.manifest import FILES, check, write_files

CONTENTS = {name: name.encode() * 40 for name in FILES}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path, {name: lambda content=content: content for name, content in CONTENTS.items()})
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "emptied": lambda path: path.write_bytes(b""),
    "another's": lambda path: shutil.copy(next(p for p in sorted(path.parent.iterdir()) if p != path), path),
    "deleted": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def test_the_manifest_lists_the_sha256_of_every_file(folder: Path) -> None:
    """Its sums are those of the contents that were written."""
    listed = json.loads((folder / "manifest.json").read_text())
    assert listed["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES} == CONTENTS
    assert check(folder) is None


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_file_is_named(name: str, damage: Callable[[Path], object], folder: Path) -> None:
    """Every kind of damage is found in every file; a manifest that is itself damaged names itself or another file."""
    damage(folder / name)
    found = check(folder)
    if name == "manifest.json" and damage in (DAMAGES["longer"], DAMAGES["truncated"]):
        assert found is None  # the end of its last line changes nothing that it says
    else:
        assert found is not None
        assert found == folder / name or name == "manifest.json"


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", '{"format": "l3d-manifest-2", "sha256": {}}', '{"format": "l3d-manifest-1", "sha256": []}',
     '{"format": "l3d-manifest-1", "sha256": {"../other": "0"}}', '{"format": "l3d-manifest-1", "sha256": {}}'],
)  # fmt: skip
def test_a_manifest_that_vouches_for_nothing_is_damaged(text: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(text)
    assert check(folder) == folder / "manifest.json"


def test_files_of_before_a_failed_move_are_whole(folder: Path) -> None:
    """The manifest is moved first: old files are still good, a mixture of old and new ones is not."""
    old = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_files(folder, {name: lambda content=content: content[1:] for name, content in CONTENTS.items()})
    assert check(folder) is None
    for i, name in enumerate(FILES):
        (folder / name).write_bytes(old[name])
        assert (check(folder) is None) == (i == len(FILES) - 1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Decomposition({"w": torch.Size([3, 2])}, 2, 1).save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["decomposition.safetensors", "decomposition.json"])
def test_a_damaged_decomposition_is_not_loaded(name: str, damage: Callable[[Path], object], saved: Path) -> None:
    """One line names the file."""
    damage(saved / name)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        l3d.load(saved)
    assert str(saved / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_user_edits_is_not_checked(saved: Path) -> None:
    """The card, a configuration and files of the user's own may be changed."""
    for name in ("README.md", "config.yaml", "metrics.json", "notes.txt"):
        (saved / name).write_text("mine")
    assert l3d.load(saved).n_subnetworks == 2


def test_a_folder_without_a_manifest_loads_with_one_warning(saved: Path) -> None:
    """Older versions wrote none; saving writes one."""
    (saved / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="no manifest") as warned:
        d = l3d.load(saved)
    assert [str(each.message) for each in warned] == [
        f"{saved}: has no manifest.json, so a damaged file may go unnoticed; save it again to write one"
    ]
    assert warned[0].filename == __file__
    d.save(saved)
    l3d.load(saved)
