"""Train each toy's network once or twice, whatever happens at once or to the file; never half."""

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

import l3d
from l3d.toys import cache, networks

from helpers import randn


class Fitting:
    """Builds and fits a small network, and counts how often."""

    def __init__(self, seed: int = 0) -> None:
        self.count, self.seed = 0, seed

    def build(self) -> networks.Network:
        return networks.Superposition(3, 2)

    def fit(self) -> networks.Network:
        self.count += 1
        network = self.build()
        with torch.no_grad():
            for i, parameter in enumerate(network.parameters()):
                parameter.copy_(randn(*parameter.shape, seed=self.seed + i))
        return network

    def __call__(self) -> dict[str, torch.Tensor]:
        return cache.trained("small", 0, self.build, self.fit).state_dict()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


OTHER = {"w": torch.zeros(2)}

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flip,
    "half a file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "an empty file": lambda path: path.write_bytes(b""),
    "another file": lambda path: path.write_bytes(b"PK" * 100),
    "no hash": lambda path: path.write_bytes(save(load_file(path))),
    "another network": lambda path: path.write_bytes(save(OTHER, {"sha256": cache._hash(OTHER)})),
    "no file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_network_is_trained_again(
    damage: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is read while it is whole, and made anew where it is not, to the same bits."""
    monkeypatch.setenv("L3D_CACHE", str(tmp_path))
    fitting = Fitting()
    first = fitting()
    second = fitting()
    assert fitting.count == 1
    [path] = tmp_path.rglob("*.safetensors")
    damage(path)
    third = fitting()
    assert fitting.count == 2
    fitting()
    assert fitting.count == 2
    for name in first:
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], third[name])


TOY = """
import sys, time
import torch
from l3d.cli.main import main
from l3d.toys import recipes

def fit(generator):
    time.sleep(1)  # so that both are at it; the true training takes ten seconds
    torch.manual_seed(0)
    return recipes.split_scale(recipes.Superposition(5, 2))

recipes._fit_tms = fit
sys.exit(main(["toy", "tms", "--steps", "5", "--n_restarts", "1", "--describe", "0", "--out", sys.argv[1]]))
"""


def test_the_same_toy_twice_at_once(tmp_path: Path) -> None:
    """One gets the folder, the other is told so; the network's file is whole from its first moment, and stays."""
    environment = os.environ | {"L3D_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(l3d.__file__).parents[1])}
    command = [sys.executable, "-c", TOY]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(tmp_path / out)], env=environment, **pipes) for out in ("a", "a")]
    [path] = _wait_for(tmp_path / "cache")
    seen = path.read_bytes()
    errors = [process.communicate()[1] for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 2]
    refusal = errors[codes.index(2)].splitlines()[-1]
    assert "is writing into" in refusal or "is not empty" in refusal
    assert [file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()] == [seen]
    assert l3d.load(tmp_path / "a").history["step"][-1] == 5
    assert not list(tmp_path.rglob(".lock"))


def _wait_for(folder: Path) -> list[Path]:
    """Wait for the first network in a cache."""
    found: list[Path] = []
    for _ in range(3000):
        found = list(folder.rglob("*.safetensors"))
        if found:
            break
        time.sleep(0.02)
    return found
