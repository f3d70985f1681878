"""Cache trained toys on disk, so that a machine trains each once: in $L3D_CACHE, else ~/.cache/l3d."""

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from l3d.storage.files import replacing
from l3d.storage.identity import digest
from l3d.storage.store import check_header
from l3d.toys.networks import Network


def trained(name: str, seed: int, build: Callable[[], Network], fit: Callable[[], Network]) -> Network:
    """Return the network that `fit` trains, from the cache if it holds it.

    A file is named after the recipes' code, torch's version and the dtype; if one changes, the network is trained
    again. It is also trained again if the file cannot be read, is damaged, or the folder cannot be written. Processes
    that start at once may each train it; each then writes a whole file of the same bits.
    """
    path = _folder() / "toys" / f"{name}-{seed}-{_version()}{_dtype()}.safetensors"
    # `build`'s initial weights are overwritten, and `fit` has its own generator
    with torch.random.fork_rng(devices=[]):
        network = build()
        try:
            network.load_state_dict(_load(path))
        except (OSError, SafetensorError, ValueError, RuntimeError):
            network = fit()
            with suppress(OSError):  # a folder that cannot be written
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as partial:
                    state = network.state_dict()
                    partial.write_bytes(save(state, metadata={"sha256": _hash(state)}))
    return network.eval()


def _load(path: Path) -> dict[str, Tensor]:
    """Read a network's tensors. Raises ValueError if they differ from those that were written."""
    check_header(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (file.metadata() or {}).get("sha256") != _hash(tensors):
            raise ValueError(f"{path}: damaged")
    return tensors


def _hash(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return digest((tensors[name] for name in names), " ".join(names))


def _folder() -> Path:
    """Return the cache folder: $L3D_CACHE, else l3d below $XDG_CACHE_HOME, else below ~/.cache."""
    named = os.environ.get("L3D_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "l3d"


@cache
def _version() -> str:
    """Return a digest of the code that makes the toys and of torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for file in ("networks.py", "recipes.py", "sampling.py"):
        digest.update((Path(__file__).parent / file).read_bytes())
    return digest.hexdigest()[:12]


def _dtype() -> str:
    """Return a suffix that names torch's default dtype; empty for float32."""
    dtype = torch.get_default_dtype()
    return "" if dtype == torch.float32 else f"-{str(dtype).removeprefix('torch.')}"
