"""Refuse bad arguments and numbers that are not finite, before anything is written or at the step they appear."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import l3d
from l3d.api import Decomposition

from helpers import Root
from training_runs import ARGUMENTS, Net, assert_same_bits, differ, nan, points, train

pytestmark = pytest.mark.usefixtures("one_batch_at_a_time")


# --- numbers that are not finite --------------------------------------------------------------------------------


def test_nan_in_the_output_names_the_step_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    """NaN from the model at step 10 says so; the checkpoint of step 8 loads, and resuming with a sane model works."""
    with pytest.raises(ValueError, match=r"^step 10: model: its output holds NaN or infinity") as error:
        train(Net(12, nan), out=tmp_path / "run", checkpoint_every=4)  # one call checks the arguments first
    assert "\n" not in str(error.value)
    checkpoint = l3d.load(tmp_path / "run" / "checkpoints" / "step000000008")
    assert all(p.isfinite().all() for p in checkpoint.parameters())
    assert checkpoint.history["step"] == list(range(1, 9))
    assert_same_bits(train(out=tmp_path / "run", checkpoint_every=4, existing="resume"), train())


@pytest.mark.parametrize("k", [0.1, 1.0])
def test_nan_in_a_gradient_names_the_tensor(k: float, tmp_path: Path) -> None:
    """A gradient that is not finite names the tensor and the step; other tensors are not blamed."""
    batches = list(points().split(8))
    batches[3] = batches[3].clone().index_fill(0, torch.tensor([5]), 0)
    with pytest.raises(ValueError, match=r"^step 3: gradients: NaN or infinity in those of 'before\.weight'"):
        train(Root(), batches, k=k, out=tmp_path / "run", checkpoint_every=2)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step000000002"]
    assert train(Root(), batches, params="after.*", k=k).history["step"][-1] == 20


def test_a_first_batch_without_a_finite_gradient_names_the_tensor(tmp_path: Path) -> None:
    """One line says so."""
    with pytest.raises(ValueError, match=r"gradients: NaN or infinity in those of 'before\.weight'") as error:
        train(Root(), torch.zeros(8, 4), out=tmp_path / "run", reference="uniform")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lr", [1e30, 1e38])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_a_run_that_diverges_is_never_returned(lr: float, steps: int, tmp_path: Path) -> None:
    """Directions that are not finite raise an error that advises a lower lr; no checkpoint holds them."""
    with pytest.raises(ValueError, match="lr"):
        train(lr=lr, steps=steps, out=tmp_path / "run", checkpoint_every=1)
    for path in (tmp_path / "run" / "checkpoints").glob("*"):
        assert all(p.isfinite().all() for p in l3d.load(path).parameters())


# --- refusals ---------------------------------------------------------------------------------------------------

X = points()
BAD: list[tuple[dict[str, Any], str]] = [
    ({"preset": "best"}, r"preset: expected one of default, published, got 'best'"),
    ({"k": 0}, r"k: expected a fraction in \(0, 1\], got 0"),
    ({"k": 1.01}, r"k: "),
    ({"k": float("nan")}, r"k: "),
    ({"k": "0.1"}, r"k: "),
    ({"n_subnetworks": 0}, r"n_subnetworks: expected a positive whole number, got 0"),
    ({"n_subnetworks": 2.5}, r"n_subnetworks: "),
    ({"batch_size": 0}, r"batch_size: expected a positive whole number, got 0"),
    ({"steps": 0}, r"steps: expected a positive whole number, got 0"),
    ({"steps": 1.5}, r"steps: "),
    ({"warm_start": 21}, r"warm_start: expected a number of steps in \[0, 20\], got 21"),
    ({"warm_start": -1}, r"warm_start: "),
    ({"lr": 0}, r"lr: expected a positive number, got 0"),
    ({"lr": float("nan")}, r"lr: "),
    ({"lr": float("inf")}, r"lr: "),
    ({"lr": "fast"}, r"lr: "),
    ({"existing": "replace"}, r"existing: expected refuse, overwrite or resume, got 'replace'"),
    ({"existing": None}, r"existing: expected refuse, overwrite or resume, got None"),
    ({"gradients": "shuffle"}, r"gradients: expected l3d.GradientOptions, got 'shuffle'"),
    ({"n_restarts": 0}, r"n_restarts: expected a positive whole number, got 0"),
    ({"n_restarts": "2"}, r"n_restarts: "),
    ({"n_restarts": True}, r"n_restarts: expected a positive whole number, got True"),
    ({"n_subnetworks": True}, r"n_subnetworks: expected a positive whole number, got True"),
    ({"checkpoint_every": 0}, r"checkpoint_every: expected a positive whole number, got 0"),
    ({"seed": 1.5}, r"seed: "),
    ({"seed": "one"}, r"seed: "),
    ({"rank": 0}, r"rank: expected positive whole numbers for '\*', got 0"),
    ({"rank": 5}, r"rank: 5 exceeds 4, the most that 'first.weight' of shape \[6, 4\] allows"),
    ({"rank": {"third.*": 1, "*": 1}}, r"rank: no decomposed parameter matches 'third.\*'"),
    ({"rank": "many"}, r"rank: "),
    ({"params": "third.*"}, r"params: no parameter matches 'third.\*'; near matches: first"),
    ({"params": []}, r"params: expected at least one pattern"),
    ({"divergence": "l2"}, r"divergence: expected mse, mse_published, kl or a callable, got 'l2'"),
    ({"divergence": lambda f, y: (f - y).square().mean()}, r"divergence: expected one value per sample, shape \[8\]"),
    ({"reference": "median"}, r"reference: expected sample, mean, uniform, pair or a tensor, got 'median'"),
    (
        {"reference": torch.zeros(5, 3)},
        r"reference: expected outputs of shape \[8, 3\] \(samples first\) or one of \[3\] for all, got \[5, 3\]",
    ),
    ({"reference": "pair"}, r"reference: 'pair' needs data that yields \(input, contrast\), got single inputs"),
    ({"reference": "pair", "data": list(X.split(8))}, r"reference: 'pair' needs data that yields \(input, contrast\)"),
    ({"positions": 0}, r"positions: expected 'all', 'last' or a positive number, got 0"),
    ({"positions": "first"}, r"positions: "),
    ({"dtype": "int32"}, r"dtype: expected a floating dtype such as 'float32', got 'int32'"),
    ({"dtype": "float31"}, r"dtype: "),
    ({"device": "toaster"}, r"device"),
    ({"backend": "cuda"}, r"backend: expected one of auto, torch, triton, got 'cuda'"),
    ({"backend": "triton"}, r"backend='triton': "),
    ({"data": 3}, r"data: expected a tensor, Dataset, DataLoader or iterable, got int"),
    ({"data": None}, r"data: expected a tensor, Dataset, DataLoader or iterable, got NoneType"),
    ({"data": X[:0]}, r"data: expected at least one sample, got none"),
    ({"data": []}, r"data: "),
    ({"data": X.numpy()}, r"data: "),
    ({"data": X[:1]}, r"reference: 'sample' needs at least two samples in a batch, got 1"),
    ({"model": nn.Flatten()}, r"model: |params: "),
    ({"model": nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()}, r"model: '1' \(Dropout\) is in training mode"),
]


def with_bad(bad: dict[str, Any], **arguments: Any) -> Decomposition:
    """Train with arguments one of which is bad; the model and the data are among them."""
    arguments = {**ARGUMENTS, **arguments, **bad}
    return l3d.decompose(arguments.pop("model", Net()), arguments.pop("data", X), **arguments)


@pytest.mark.parametrize("bad, message", BAD, ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_bad_arguments_are_refused_before_anything_is_written(
    bad: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bad argument raises one line that names it, and no run folder is made."""
    monkeypatch.setattr("l3d_kernels.registry.interpreted", lambda: False)  # the interpreter takes CPU tensors
    kinds = RuntimeError if bad == {"backend": "triton"} else ValueError
    with pytest.raises(kinds, match=rf"^{message}" if kinds is ValueError else message) as error:
        with_bad(bad, out=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", [{"k": 2}, {"backend": "cuda"}, {"reference": "pair"}, {"rank": 99}], ids=str)
def test_a_refused_run_does_not_overwrite_another(bad: dict[str, Any], tmp_path: Path) -> None:
    """With overwrite, an old run is removed only once the new one's arguments hold."""
    old = train(out=tmp_path / "run")
    with pytest.raises(ValueError, match=next(iter(bad))):
        with_bad(bad, out=tmp_path / "run", existing="overwrite")
    assert_same_bits(l3d.load(tmp_path / "run"), old)


def test_a_folder_in_use_is_refused_without_overwrite(tmp_path: Path) -> None:
    """A non-empty folder is refused; an empty one is taken; overwrite replaces a run and nothing beside it."""
    (tmp_path / "run").mkdir()
    first = train(out=tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^out: .* is not empty; choose another folder or pass existing='overwrite'"):
        train(out=tmp_path / "run", seed=1)
    assert_same_bits(l3d.load(tmp_path / "run"), first)
    second = train(out=tmp_path / "run", seed=1, existing="overwrite")
    assert_same_bits(l3d.load(tmp_path / "run"), second)
    assert differ(first, second)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("names", [["notes.txt"], ["checkpoints/keep.txt"], ["decomposition.json"], ["config.yaml"]])
def test_overwrite_refuses_a_foreign_folder(names: list[str], tmp_path: Path) -> None:
    """A folder that no run wrote is not touched, even where its files have the names of a run's."""
    for name in names:
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"^out: .* holds no run"):
        train(out=tmp_path / "other", existing="overwrite")
    assert all((tmp_path / "other" / name).read_text() == "mine" for name in names)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    """A path to a file is refused and the file is left, with overwrite too."""
    (tmp_path / "file").write_text("mine")
    for existing in ("refuse", "overwrite"):
        with pytest.raises(ValueError, match=r"^out: .* is a file"):
            train(out=tmp_path / "file", existing=existing)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_is_told_once_everything_holds(tmp_path: Path) -> None:
    """`on_folder` gets the folder after the checks and before training, and is not called where they fail."""
    seen: list[tuple[Path, bool]] = []

    class Note(l3d.callbacks.Callback):
        def on_folder(self, folder: Path) -> None:
            seen.append((folder, (folder / "checkpoints").exists()))

    with pytest.raises(ValueError, match="k: "):
        train(out=tmp_path / "run", k=2, callbacks=[Note()])
    train(callbacks=[Note()])  # no folder, nothing to tell
    assert seen == []
    train(out=tmp_path / "run", callbacks=[Note()])
    assert seen == [(tmp_path / "run", False)]


@pytest.mark.parametrize(
    "group, fields, message",
    [
        (l3d.Replacement, {"enabled": "yes"}, "replacement: enabled: expected True or False, got 'yes'"),
        (l3d.Replacement, {"enabled": 1}, "replacement: enabled: expected True or False, got 1"),
        (l3d.Replacement, {"restart_every": 0}, "replacement: restart_every: expected a positive whole number, got 0"),
        (l3d.Replacement, {"candidates": 1.5}, "replacement: candidates: expected a positive whole number, got 1.5"),
        (l3d.Memory, {"micro_batch_size": 0}, "micro_batch_size: expected a positive whole number, got 0"),
        (l3d.GradientOptions, {"shuffle": 1}, "shuffle: expected True or False, got 1"),
        (l3d.GradientCache, {"folder": "c", "reads": "maybe"}, "cache: reads: expected auto, on or off, got 'maybe'"),
        (l3d.GradientCache, {"n_references": 0}, "n_references: expected a positive whole number, got 0"),
        (l3d.GradientCache, {"n_references": 2}, "cache: n_references and reads need the cache's folder, got none"),
        (l3d.GradientCache, {"reads": "on"}, "cache: n_references and reads need the cache's folder, got none"),
    ],
    ids=str,
)
def test_bad_options_of_a_group_are_refused_as_it_is_made(group: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        group(**fields)
