"""Gradient factors of fixed data on disk: written once, read over epochs, restarts and sweeps.

With a cache, a run's batches repeat: step t trains on the gradients of step t mod n, n = n_references epochs, each
with rows and references drawn anew. So what is trained on does not depend on whether a batch is read or extracted
again, and a run ends in the same bits either way; only time decides, and it is measured: on the first batches,
extracting against reading from the disk (not from memory that happens to hold the file still).

A store is a folder: cache.json says whose gradients these are (a hash of the model's tensors and of the data, and
every choice that decides a gradient), batch-NNNNNN.safetensors holds one step's, each written whole and
memory-mapped when read. Each of these says whose gradients and which step's it holds, with a SHA-256 of all of that.
A process checks a file's hash once, and again only if the file's size or time has changed since. Tensors that layers
share (the input of q, k and v) are stored once. Where a gradient is smaller than its factors, as in convolutions, it is
the gradient that is stored (`l3d.gradients.factors.compact`).
"""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from l3d.data.batch import tensors_of
from l3d.data.batches import count_rows, take
from l3d.distributed.process_group import ProcessGroup
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Dense, Gradients, Part, Place, Rows, place_of
from l3d.storage.files import create_text, read_json, replacing
from l3d.storage.identity import digest
from l3d.storage.schema import one_line
from l3d.storage.store import check_header
from l3d.training.settings import Settings

T = TypeVar("T")

FORMAT = "l3d-gradients-3"
TRIALS = 3  # batches that extraction and reading are timed on, after one to warm up
# What of the settings decides a batch's gradients; steps, K, rank, k and the optimiser's do not.
DECIDING = ("divergence", "reference", "positions", "batch_size", "seed", "dtype")


class Cache:
    """A store of the gradients of the steps 0 .. n_steps − 1, and the choice between it and extraction.

    Args:
        path: the store's folder, made if missing.
        identity: whose gradients these are, json-able; a store with another is refused.
        n_steps: batches in the store when it is full.
        extract: returns a step's gradients.
        reads: "on" to read whatever is stored, "off" never to, "auto" for what is measured to be faster.
        ranks: the processes that train together; the first one writes, and decides for all.
        seconds: returns what the last extraction took per batch, where several are extracted at once.

    Raises ValueError where the folder holds gradients of something else, naming what differs.
    """

    def __init__(
        self,
        path: str | Path,
        identity: Mapping[str, Any],
        n_steps: int,
        extract: Callable[[int], Gradients],
        reads: str = "auto",
        group: ProcessGroup | None = None,
        seconds: Callable[[], float] | None = None,
    ) -> None:
        self.path, self.n_steps, self.extract, self.group = Path(path), n_steps, extract, group
        self.seconds = seconds
        self.identity = {"format": FORMAT, **identity}
        self.run = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.reading: bool | None = {"on": True, "off": False, "auto": None}[reads]
        self.begun = False  # whether this run has made cache.json, or found it to be its own before it wrote
        self.compared = False  # whether a stored batch was found to be what is extracted now
        self.extract_seconds: list[float] = []
        self.read_seconds: list[float] = []
        self._agreed(self.check)

    def _agreed(self, decide: Callable[[], T]) -> T:
        return decide() if self.group is None else self.group.agreed(decide)

    def _stored(self, index: int) -> bool:
        return self._agreed(lambda: self._file(index).exists())

    def check(self) -> None:
        """Refuse a folder that holds something else."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"cache: {self.path} is a file; name a folder")
        if not (self.path / "cache.json").exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ValueError(f"cache: {self.path} is not empty and no store of gradients; choose another folder")
            return
        found = read_json(self.path / "cache.json")
        wanted = json.loads(json.dumps(self.identity))
        other = [name for name in wanted if found.get(name) != wanted[name]]
        if other:
            raise ValueError(
                f"cache: {self.path} holds gradients of another {', '.join(other)}; choose another folder or delete it"
            )

    def __getitem__(self, step: int) -> Gradients:
        """Return the gradients of a step, read or extracted."""
        index = step % self.n_steps
        if self.reading is None:
            return self._measured(index)
        if not self.reading:
            return self.extract(index)
        if not self._stored(index):
            gradients = self.extract(index)
            self.write(index, gradients)
            return gradients
        stored = self.read(index)
        if not self.compared:  # the identity knows tensors, not what the model's code makes of them
            check_same(self.extract(index), stored, self._file(index))
            self.compared = True
        return stored

    def choice(self) -> str:
        """Say what was measured and what is done."""
        if self.reading is None:
            return "cache: not yet measured"
        does = "reading" if self.reading else "extracting"
        if not self.read_seconds:
            return f"cache: {does}, as asked"
        extracting, reading = statistics.median(self.extract_seconds), statistics.median(self.read_seconds)
        return f"cache: a batch takes {extracting:.4f} s to extract, {reading:.4f} s to read; {does}"

    def _measured(self, index: int) -> Gradients:
        """Extract a batch, store it, read it back; decide once that has been timed often enough."""
        started = time.perf_counter()
        gradients = self.extract(index)
        _finish(gradients.device)
        elapsed = time.perf_counter() - started
        stored = self._stored(index)
        if not stored:
            self.write(index, gradients)
            self._stored(index)  # the others wait for the one that writes
        elif _seen.get(self._file(index)) is None:
            self.read(index)  # which checks its hash: that is not what is timed
        _drop_from_memory(self._file(index))
        reopened = time.perf_counter()
        again = self.read(index)
        for _, tensor in again.tensors():
            tensor.to(gradients.device, copy=True)  # a mapped file is read when it is touched
        _finish(gradients.device)
        self.read_seconds.append(time.perf_counter() - reopened)
        self.extract_seconds.append(elapsed if self.seconds is None else self.seconds())
        if stored:
            check_same(gradients, again, self._file(index))
            self.compared = True
        if len(self.read_seconds) > TRIALS:  # the first extraction also warms up what later ones find warm
            del self.extract_seconds[0], self.read_seconds[0]
            extracting, reading = statistics.median(self.extract_seconds), statistics.median(self.read_seconds)
            self.reading = self._agreed(lambda: reading < extracting)
        return gradients

    def _file(self, index: int) -> Path:
        return self.path / f"batch-{index:06d}.safetensors"

    def write(self, index: int, gradients: Gradients) -> None:
        """Store a step's gradients, the whole file or nothing."""
        if self.group is not None and self.group.rank > 0:
            return
        if not (self.begun and (self.path / "cache.json").exists()):
            self.path.mkdir(parents=True, exist_ok=True)
            if not create_text(self.path / "cache.json", json.dumps(self.identity, indent=1) + "\n"):
                self.check()  # another run may have begun it since, with something else
            self.begun = True
        with replacing(self._file(index), flushed=False) as partial, partial.open("wb") as file:
            file.write(pack(gradients, self._holds(index)))
            file.flush()
            os.fsync(file.fileno())
        _seen[self._file(index)] = _state(self._file(index))

    def read(self, index: int) -> Gradients:
        """Map a stored step's gradients; raises ValueError for a damaged file, and for one of another run or step."""
        return unpack(self._file(index), self._holds(index))

    def _holds(self, index: int) -> str:
        return f"{self.run} {index}"


def contents(model: nn.Module, extractor: Extractor, data: Any, settings: Settings, n_references: int) -> dict:
    """Say what decides the gradients of a run's batches.

    Raises ValueError for what cannot be identified: a stream of batches, a callable divergence.
    """
    if count_rows(data) is None:
        raise ValueError("cache: needs data whose rows can be counted, a tensor or Dataset; a stream is never the same")
    if settings.divergence == "callable":
        raise ValueError("cache: needs a divergence with a name; that a callable is the same cannot be told")
    chosen = {name: value for name, value in asdict(settings).items() if name in DECIDING}
    if isinstance(extractor.reference, Tensor):
        chosen["reference"] = digest([extractor.reference])
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    named = f"{type(model).__module__}.{type(model).__qualname__} " + " ".join(tensors)
    found = {"model": digest(tensors.values(), named), "params": list(extractor.parameters)}
    if extractor.exponent:
        chosen["exponent"] = extractor.exponent
    return found | {"data": digest(_tensors_in(data)), "n_references": n_references, **chosen}


def _tensors_in(data: Any) -> Iterator[Tensor]:
    """Walk over a tensor, or over the tensors of a Dataset's rows."""
    if isinstance(data, Tensor):
        yield data
        return
    for row in range(count_rows(data) or 0):
        yield from tensors_of(take(data, [row]))


def check_same(gradients: Gradients, stored: Gradients, path: Path) -> None:
    """Refuse a stored batch that extraction does not give again: the model's code has changed since."""
    kinds = [[(name, tensor.dtype, tensor.shape) for name, tensor in each.tensors()] for each in (gradients, stored)]
    same = kinds[0] == kinds[1]
    for (_, a), (_, b) in zip(gradients.tensors(), stored.tensors(), strict=False):
        tolerance = 1e-3 * float(a.abs().max()) if a.is_floating_point() and a.numel() else 0.0
        same = same and torch.allclose(a.cpu().double(), b.cpu().double(), rtol=0, atol=tolerance)
    if not same:
        raise ValueError(f"cache: {path} differs from the gradients extracted now; delete the store, it is stale")


_seen: dict[Path, tuple[int, int, int]] = {}  # files whose hash this process has checked, and their `_state` then


def _state(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file does: its number on the disk, its size and its time in ns."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def pack(gradients: Gradients, holds: str = "") -> bytes:
    """Write gradients as a safetensors file with a hash; tensors that are the same one are written once.

    holds: whose gradients these are, and which step's.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[Place, str] = {}

    def put(tensor: Tensor) -> str:
        key = place_of(tensor)
        if key not in names:
            names[key] = f"t{len(names)}"
            tensors[names[key]] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        return names[key]

    parts = {
        name: [["rows", put(p.x), put(p.dy), p.x_axis] if isinstance(p, Rows) else ["dense", put(p.grad)] for p in each]
        for name, each in gradients.parts.items()
    }
    shapes = {name: list(shape) for name, shape in gradients.shapes.items()}
    dtype = str(gradients.dtype).removeprefix("torch.")
    header = {"parts": parts, "shapes": shapes, "n_samples": gradients.n_samples, "dtype": dtype}
    written = {"gradients": json.dumps(header), "holds": holds}
    return to_bytes(tensors, metadata={**written, "sha256": _hash(written, tensors)})


def _hash(written: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of a batch file's header and tensors, names, dtypes and shapes among it."""
    return digest((tensors[name] for name in sorted(tensors)), "\n".join([*written.values(), *sorted(tensors)]))


def unpack(path: Path, holds: str | None = None) -> Gradients:
    """Map the gradients that `pack` wrote; raises ValueError for a damaged file, and for one that holds others.

    holds: whose gradients are expected, and which step's; None for any.
    """
    try:
        before = _state(path)
        check_header(path)
        with torch.device("cpu"), safe_open(path, framework="pt") as file:  # whatever torch's default device is
            found = file.metadata() or {}
            written = {name: found[name] for name in ("gradients", "holds")}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _seen.get(path) != before:
            if _hash(written, tensors) != found["sha256"]:
                raise ValueError("its content does not have the hash that was written with it")
            _seen[path] = before
        if holds not in (None, written["holds"]):
            raise ValueError("it holds the gradients of another run or step")
        header = json.loads(written["gradients"])

        def part(kind: str, first: str, *more: Any) -> Part:
            return Dense(tensors[first]) if kind == "dense" else Rows(tensors[first], tensors[more[0]], more[1])

        parts = {name: [part(*each) for each in held] for name, held in header["parts"].items()}
        shapes = {name: torch.Size(shape) for name, shape in header["shapes"].items()}
        dtype = getattr(torch, header["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{dtype!r} is no dtype")
    except FileNotFoundError as error:
        raise ValueError(f"cache: {path} is gone; keep the folder while a run uses it") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise ValueError(f"cache: {path} is damaged ({one_line(error)}); delete it") from error
    return Gradients(parts, shapes, header["n_samples"], dtype, torch.device("cpu"))


def _finish(device: torch.device) -> None:
    """Wait for what a GPU has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _drop_from_memory(path: Path) -> None:
    """Ask the system to forget a file's pages, so that a timed read is one from the disk; where it cannot, go on."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
