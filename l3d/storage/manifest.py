"""Write the files of a decomposition or checkpoint with a manifest of their SHA-256, and find a damaged one."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from l3d.storage.files import naming, read_json, replacing_all

MANIFEST = "manifest.json"
FORMAT = "l3d-manifest-1"
DECOMPOSITION = ("decomposition.safetensors", "decomposition.json")
# in the order in which they are put in place; a folder that holds the last is complete
FILES = ("decomposition.safetensors", "optimizer.safetensors", "state.json", "decomposition.json")


def write_files(folder: Path, contents: Mapping[str, Callable[[], bytes]]) -> None:
    """Write some of `FILES` and the manifest; none is put in place before all are on the disk.

    contents: called one at a time, so that memory holds one. Raises WriteError.
    """
    names = [name for name in FILES if name in contents]
    sums: dict[str, str] = {}
    # should a move fail, the old files are still what the manifest lists
    listed = {"format": FORMAT, "sha256": sums, "before": _sums(folder)}
    with replacing_all([folder / name for name in (MANIFEST, *names)]) as (listing, *partials):
        for name, partial in zip(names, partials, strict=True):
            content = contents[name]()
            with naming(folder / name):
                partial.write_bytes(content)
            sums[name] = hashlib.sha256(content).hexdigest()
        listing.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


def check(folder: Path, names: Sequence[str] = FILES) -> Path | None:
    """Return the first file that is missing or not what the manifest lists; None if all agree.

    names: of the files to look at. An unreadable manifest is the first damaged file.
    """
    sums, before = _sums(folder), _sums(folder, "before")
    if not sums:
        return folder / MANIFEST
    found = {name: sha256(folder / name) for name in names if name in sums or (folder / name).exists()}
    if all(before.get(name) == now for name, now in found.items()):
        return None
    return next((folder / name for name, now in found.items() if sums.get(name) != now), None)


def _sums(folder: Path, which: str = "sha256") -> dict[str, str]:
    """Return the sums that a folder's manifest lists; {} where it is missing or damaged."""
    try:
        listed = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return {}
    sums = listed.get(which)
    if listed.get("format") != FORMAT or not isinstance(sums, dict) or not set(sums) <= set(FILES):
        return {}
    return sums


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file; "" for one that cannot be read."""
    hashed = hashlib.sha256()
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            while part := file.read(2**20):
                hashed.update(part)
    except OSError:  # a damaged disk
        return ""
    return hashed.hexdigest()
