"""Read files that were damaged at random: one line of error, or a valid value; never other numbers under a checksum.

`make test-long` takes 10,000 files of each kind (1,000 where a case takes long), in parts that can be run apart:
pytest tests/long/test_mutations.py -m long -k "arrays and part7". A short form is part of `make test`.
"""

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d.cli.main import main
from l3d.cli.parser import read_settings
from l3d.data.sources import load_data
from l3d.report.report import write_report
from l3d.storage.run_folder import read_command, write_config
from l3d.training import gradient_cache

from mutations import CHANGES, Tally

PARTS = 20  # of the long form
MANY, FEW = 10_000, 1_000  # files in all parts together
SHORT = {MANY: 50, FEW: 10}

Case = Callable[[], str]
Kind = Callable[[Path], tuple[list[str], Callable[[Path], str]]]  # pristine folder -> files to damage, what reads them


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def points() -> Tensor:
    return torch.randn(40, 4, generator=torch.Generator().manual_seed(0))


ARGUMENTS: dict[str, Any] = {"n_subnetworks": 4, "rank": 2, "k": 0.3, "batch_size": 8, "callbacks": []}


def same(ours: Any, theirs: Any) -> bool:
    """Tell whether two decompositions agree in every number that a file holds."""
    a, b = ours.state_dict(), theirs.state_dict()
    equal = list(a) == list(b) and all(torch.equal(bits(a[name]), bits(b[name])) for name in a)
    figures = ("settings", "history", "threshold", "timing", "base_model", "restart_errors")
    return equal and all(repr(getattr(ours, each)) == repr(getattr(theirs, each)) for each in figures)


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes: NaN is NaN then."""
    return tensor.detach().contiguous().view(torch.uint8)


def guarded(folder: Path) -> bool:
    """Tell whether a folder's files have checksums."""
    return (folder / "manifest.json").is_file()


def load(folder: Path) -> tuple[list[str], Callable[[Path], str]]:
    """`l3d.load` of a decomposition."""
    l3d.decompose(network(), points(), **ARGUMENTS, steps=6).save(folder)
    expected, checked = l3d.load(folder), guarded(folder)

    def act(damaged: Path) -> str:
        loaded = same(l3d.load(damaged), expected)
        assert loaded or not (checked and guarded(damaged)), "other numbers under a checksum"
        return "the same" if loaded else "other values"

    return [path.name for path in folder.iterdir() if path.suffix in CHANGES], act


def use(folder: Path) -> tuple[list[str], Callable[[Path], str]]:
    """`l3d.load` of a folder without checksums, and whatever can be asked of a decomposition without its model."""
    files, _ = load(folder)
    (folder / "manifest.json").unlink(missing_ok=True)  # else none but whole files would come that far
    files = [name for name in files if name != "manifest.json"]
    gradients = l3d.extract_gradients(network(), points()[:8])

    def act(damaged: Path) -> str:
        d = l3d.load(damaged)
        text = repr(d) + d._repr_html_()
        assert len(d) >= 1
        assert text
        for i in range(len(d)):
            assert set(d.subnetwork(i)) == set(d.parameter_names)
            d.factors(i)
        d.save(damaged / "again")
        assert same(l3d.load(damaged / "again"), d)
        d.encode(gradients)
        d.code(gradients)
        d.loss(gradients)
        return "used"

    return files, act


def config(folder: Path) -> tuple[list[str], Callable[[Path], str]]:
    """Read config.yaml as every command does that goes on with a run."""
    settings = {"model": "python:a:b", "data": "npz:a.npz", "data_args": {"mean": [0.5], "rows": "-5:"}, "steps": 5,
                "rank": {"h.*": 3, "*": [1, 2]}, "params": ["h.*"], "lr": 1e-3, "held_out": 3, "k": 0.1, "seed": 3,
                "replacement": {"enabled": True}, "log": "tensorboard", "dtype": "float32"}  # fmt: skip
    write_config(folder, "decompose", settings)

    def act(damaged: Path) -> str:
        read = read_settings(read_command(damaged), damaged)
        assert json.dumps(read, allow_nan=False)
        return "read"

    return ["config.yaml"], act


def arrays(folder: Path) -> tuple[list[str], Callable[[Path], str]]:
    """Arrays of the user's own, as data."""
    random = np.random.default_rng(0)
    np.savez(folder / "images.npz", images=random.integers(0, 256, (5, 4, 3, 2), dtype=np.uint8), labels=np.arange(5))
    np.savez_compressed(folder / "packed.npz", random.normal(size=(6, 3)))
    np.save(folder / "rows.npy", random.normal(size=(9, 5)).astype(np.float32))
    np.save(folder / "ids.npy", random.integers(0, 50, (7, 6)))

    def act(damaged: Path) -> str:
        for path in sorted(damaged.iterdir()):
            kind = "tokens" if path.name == "ids.npy" else "npz"
            found = load_data(f"{kind}:{path}")
            assert isinstance(found, Tensor)
            assert len(found) > 0
        return "read"

    return ["images.npz", "packed.npz", "rows.npy", "ids.npy"], act


def cache(folder: Path) -> tuple[list[str], Callable[[Path], str]]:
    """A store of gradients, read by another run of the same."""
    gradients = l3d.extract_gradients(network(), points()[:8])
    others = l3d.extract_gradients(network(), points()[8:16])
    each = [gradients, others]

    def store(path: Path) -> gradient_cache.Cache:
        return gradient_cache.Cache(path, {"data": "points", "seed": 0}, 2, lambda step: each[step], "on")

    whole = store(folder)
    for step in range(2):
        whole[step]

    def act(damaged: Path) -> str:
        gradient_cache._seen.clear()  # as in a new process
        again = store(damaged)
        for step in (1, 0, 1):
            for (name, a), (other, b) in zip(again[step].tensors(), each[step].tensors(), strict=True):
                assert name == other
                assert torch.equal(a, b), "other numbers under a checksum"
        return "the same"

    return ["cache.json", "batch-000000.safetensors", "batch-000001.safetensors"], act


def resume(folder: Path) -> tuple[list[str], Callable[[Path], str]]:
    """A run that goes on from its checkpoint."""
    whole = l3d.decompose(network(), points(), **ARGUMENTS, steps=8, checkpoint_every=3, out=folder / "whole")
    arguments = ARGUMENTS | {"steps": 8, "checkpoint_every": 3}

    def stop(run: Any, gradients: Any, step: Any = l3d.training.run.Run.take_step) -> Any:
        if run.step == 7:
            raise KeyboardInterrupt
        return step(run, gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(l3d.training.run.Run, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            l3d.decompose(network(), points(), **arguments, out=folder / "run")
    shutil.rmtree(folder / "whole")
    files = [str(path.relative_to(folder)) for path in (folder / "run").rglob("*") if path.suffix in CHANGES]
    checked = any(Path(file).name == "manifest.json" for file in files)

    def act(damaged: Path) -> str:
        manifests = len(list(damaged.rglob("manifest.json")))
        d = l3d.decompose(network(), points(), **arguments, out=damaged / "run", existing="resume")
        equal = all(
            torch.equal(a, b) for a, b in zip(d.state_dict().values(), whole.state_dict().values(), strict=True)
        )
        assert equal or not (checked and manifests == sum(Path(file).name == "manifest.json" for file in files)), (
            "other numbers under a checksum"
        )
        return "the same bits" if equal else "other values"

    return files, act


def resume_older(folder: Path) -> tuple[list[str], Callable[[Path], str]]:
    """A run that goes on from a checkpoint without checksums."""
    files, act = resume(folder)
    for path in folder.rglob("manifest.json"):
        path.unlink()
    return [file for file in files if Path(file).name != "manifest.json"], act


def finished(folder: Path) -> list[str]:
    """Make a finished run from the command line, with everything in its folder."""
    (folder / "user.py").write_text(
        "import torch\nfrom torch import nn\n\ndef model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))\n\n"
        "def data():\n    return torch.randn(40, 4, generator=torch.Generator().manual_seed(0))\n"
    )
    command = ["decompose", "--model", "python:user:model", "--data", "python:user:data", "--n_subnetworks", "4"]
    command += ["--rank", "2", "--k", ".3", "--batch_size", "8", "--steps", "6", "--held_out", "8", "--out", "run"]
    assert main(command) == 0
    write_report("run", columns={"mine": [1.0, 2.0, None, 3.0]})
    Path("run", "interventions.json").write_text('{"subnetworks": [0, 2], "ratio": [2.5, null], "rows": 256}\n')
    shutil.rmtree(Path("run", "checkpoints"))
    return [str(Path("run", path.name)) for path in Path("run").iterdir() if path.suffix in CHANGES]


def report(folder: Path) -> tuple[list[str], Callable[[Path], str]]:
    """The report of a finished run."""
    files = finished(folder)

    def act(damaged: Path) -> str:
        page = write_report(damaged / "run").read_text(encoding="utf-8")
        assert page.rstrip().endswith("</html>")
        return "written"

    return files, act


def evaluate(folder: Path) -> tuple[list[str], Callable[[Path], str]]:
    """`l3d evaluate` of a finished run."""
    files = finished(folder)

    def act(damaged: Path) -> str:
        code = main(["evaluate", str(damaged / "run")])
        assert code in (0, 2)
        return "evaluated" if code == 0 else "refused"

    return files, act


KINDS: dict[Kind, int] = {
    load: MANY, use: MANY, config: MANY, arrays: MANY, cache: MANY,
    resume: FEW, resume_older: FEW, report: FEW, evaluate: FEW,
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in; errors that the command line would put into one line are raised, whatever warns is quiet."""
    (tmp_path / "pristine").mkdir()
    monkeypatch.chdir(tmp_path / "pristine")
    monkeypatch.setenv("L3D_DEBUG", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path
    sys.modules.pop("user", None)


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, PARTS + 1))], ids="part{}".format
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damaged_files(kind: Kind, part: int, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback, no hang, no memory beyond twice the file and 200 MB; under a checksum no other number."""
    files, act = kind(place / "pristine")
    assert act(_copied(place)) in ("the same", "used", "read", "the same bits", "written", "evaluated")
    tally = Tally()
    for case in range(SHORT[KINDS[kind]] if part == 0 else KINDS[kind] // PARTS):
        rng = Random(f"{kind.__name__} {part} {case}")
        damaged = _copied(place)
        name = rng.choice(files)
        path = damaged / name
        data = path.read_bytes()
        path.write_bytes(CHANGES[path.suffix](data, rng))
        size = max(os.stat(file).st_size for file in (path, *damaged.rglob("*.*")))
        tally.case(f"{kind.__name__} part {part} case {case}: {name}", size, lambda damaged=damaged: act(damaged))
    with capsys.disabled():
        print(f"\n{kind.__name__}, part {part}: {sum(tally.counts.values())} files; {dict(tally.counts)}")
    assert not tally.wrong, "\n".join(tally.wrong)


def _copied(place: Path) -> Path:
    shutil.rmtree(place / "damaged", ignore_errors=True)
    shutil.copytree(place / "pristine", place / "damaged", ignore=shutil.ignore_patterns("__pycache__"))
    return place / "damaged"
