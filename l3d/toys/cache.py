"""Trained toys on disk, so that each is trained once on a machine: $L3D_CACHE, else ~/.cache/l3d."""

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from l3d.storage.files import replacing
from l3d.toys.networks import Network


def trained(name: str, seed: int, build: Callable[[], Network], fit: Callable[[], Network]) -> Network:
    """Return the network that `fit` trains, from disk where it has been trained before.

    A file belongs to the recipes' code and torch's version: another of either trains anew. A folder that cannot be
    written and a file that cannot be read do no harm: then the network is trained again.
    """
    path = _folder() / "toys" / f"{name}-{seed}-{_version()}{_dtype()}.safetensors"
    with torch.random.fork_rng(devices=[]):  # the start is overwritten, or drawn from a generator of its own
        network = build()
        try:
            network.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError):
            network = fit()
            _write(path, network)
    return network.eval()


def _write(path: Path, network: Network) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(save(network.state_dict()))
    except OSError:
        return


def _folder() -> Path:
    named = os.environ.get("L3D_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "l3d"


@cache
def _version() -> str:
    """Digest the code that makes the toys, with torch's version."""
    digest = hashlib.sha256(torch.__version__.encode())
    for file in ("networks.py", "recipes.py", "sampling.py"):
        digest.update((Path(__file__).parent / file).read_bytes())
    return digest.hexdigest()[:12]


def _dtype() -> str:
    """Name the dtype toys are trained in now, where it is not the usual one."""
    dtype = torch.get_default_dtype()
    return "" if dtype == torch.float32 else f"-{str(dtype).removeprefix('torch.')}"
