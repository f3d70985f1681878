"""Cache trained toys on disk, so that a machine trains each once: in $L3D_CACHE, else ~/.cache/l3d."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from l3d.storage.files import replacing
from l3d.toys.networks import Network


def trained(name: str, seed: int, build: Callable[[], Network], fit: Callable[[], Network]) -> Network:
    """Return the network that `fit` trains, from the cache if it holds it.

    A file is named after the recipes' code, torch's version and the dtype; if one changes, the network is trained
    again. It is also trained again if the file cannot be read or the folder cannot be written.
    """
    path = _folder() / "toys" / f"{name}-{seed}-{_version()}{_dtype()}.safetensors"
    # `build`'s initial weights are overwritten, and `fit` has its own generator
    with torch.random.fork_rng(devices=[]):
        network = build()
        try:
            network.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError):
            network = fit()
            with suppress(OSError):  # a folder that cannot be written
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as partial:
                    partial.write_bytes(save(network.state_dict()))
    return network.eval()


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
