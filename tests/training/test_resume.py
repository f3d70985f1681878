"""Resume interrupted runs: to the bit, and refused where the arguments changed."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import l3d
from l3d.training import history

from training_runs import Net, assert_same_bits, interrupt, points, recipe, train

pytestmark = pytest.mark.usefixtures("one_batch_at_a_time")


@pytest.mark.parametrize("stream", [False, True], ids=["tensor", "list of batches"])
@pytest.mark.parametrize("records", [1000, 7])
@pytest.mark.parametrize("n_restarts", [1, 2])
@pytest.mark.parametrize("at", [4, 8, 12, 19])
def test_resuming_reproduces_the_uninterrupted_run(
    at: int, n_restarts: int, records: int, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at any step, before the first checkpoint or after, and resumed: the same bits as in one go."""
    monkeypatch.setattr(history, "RECORDS", records)
    data = list(points().split(8)) if stream else points()
    arguments = {"n_restarts": n_restarts, "checkpoint_every": 4}
    whole = train(data=data, out=tmp_path / "whole", **arguments)
    model = Net(at, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(model, data, out=tmp_path / "run", **arguments)
    resumed = None
    if not (tmp_path / "run" / "checkpoints").exists():
        with pytest.raises(FileNotFoundError, match="out: nothing to resume"):
            train(data=data, out=tmp_path / "run", existing="resume", **arguments)
        return
    resumed = train(data=data, out=tmp_path / "run", existing="resume", **arguments)
    assert_same_bits(resumed, whole)
    assert resumed.restart_errors == whole.restart_errors
    for name in ("decomposition.safetensors", "checkpoints/step000000020/optimizer.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resuming_twice_and_when_all_is_done(tmp_path: Path) -> None:
    """A run interrupted twice ends in the same bits, and resuming a finished run changes none."""
    whole = train()
    for at in (9, 10):  # the second counts from the resumed step
        with pytest.raises(KeyboardInterrupt):
            train(
                Net(at, interrupt),
                out=tmp_path / "run",
                checkpoint_every=3,
                existing="resume" if at == 10 else "refuse",
            )
    assert_same_bits(train(out=tmp_path / "run", checkpoint_every=3, existing="resume"), whole)
    model = Net()
    assert_same_bits(train(model, out=tmp_path / "run", checkpoint_every=3, existing="resume"), whole)
    assert model.made.calls <= 1  # the check of the arguments; nothing was trained


def test_only_the_last_two_checkpoints_are_held(tmp_path: Path) -> None:
    """Older checkpoints go when a newer one is whole, so a run folder does not grow with the steps."""
    train(out=tmp_path / "run", n_restarts=2, checkpoint_every=3)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step000000018", "step000000020"]
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_half_a_checkpoint_is_ignored(tmp_path: Path) -> None:
    """A checkpoint whose writing was interrupted is not resumed from: the one before it is."""
    with pytest.raises(KeyboardInterrupt):
        train(Net(12, interrupt), out=tmp_path / "run", checkpoint_every=4)
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step000000008", folder / "step000000012.partial")
    (folder / "step000000012.partial" / "state.json").write_text("{")
    assert_same_bits(train(out=tmp_path / "run", checkpoint_every=4, existing="resume"), train())


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0.2},
        {"lr": 0.01},
        {"steps": 30},
        {"seed": 1},
        {"rank": 1},
        {"n_subnetworks": 5},
        {"reference": "mean"},
        {"divergence": "mse_published"},
        {"params": "first.*"},
        {"preset": "published"},
        {"dtype": "float64"},
        {"batch_size": 16},
        {"warm_start": 3},
        {"positions": "last"},
        {"backend": "torch"},
        {"n_restarts": 2},
        {"gradients": l3d.GradientOptions(shuffle=True)},
        {"replacement": recipe(enabled=False)},
        {"replacement": recipe(replace_every=50)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_resuming_with_changed_arguments_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """A changed setting is named, and the interrupted run's checkpoint is left as it is."""
    (name,) = change
    arguments = {"preset": change[name]} if name == "replacement" else change  # a preset has the replacement in it
    with pytest.raises(KeyboardInterrupt):
        train(Net(12, interrupt), out=tmp_path / "run", checkpoint_every=4)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"resume: .*\b{name}\b.* differ from the interrupted run's"):
        train(out=tmp_path / "run", existing="resume", **{"checkpoint_every": 4, **arguments})
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_resuming_another_model_is_refused(tmp_path: Path) -> None:
    """A model whose parameters have other shapes than the interrupted run's is refused in one line."""
    with pytest.raises(KeyboardInterrupt):
        train(Net(12, interrupt), out=tmp_path / "run", checkpoint_every=4)
    other = Net()
    other.second = nn.Linear(6, 2)
    with pytest.raises(ValueError, match="resume: ") as error:
        train(other, out=tmp_path / "run", checkpoint_every=4, existing="resume")
    assert "\n" not in str(error.value)


def test_resuming_without_a_folder_is_refused(tmp_path: Path) -> None:
    """To resume needs a run to go on from: without `out` it is an error, not a new run."""
    with pytest.raises(ValueError, match=r"^existing: 'resume' needs the run folder as out"):
        train(existing="resume")
    with pytest.raises(FileNotFoundError, match="out: nothing to resume"):
        train(existing="resume", out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


class Stop(l3d.callbacks.Callback):
    """Interrupts a run, as Ctrl-C would."""

    def on_step(self, step: int, figures: Any) -> None:
        if step == 11:
            raise KeyboardInterrupt


def begin(folder: Path, **arguments: Any) -> dict[str, bytes]:
    """Interrupt a run after its 11th step, and return the files it leaves."""
    with pytest.raises(KeyboardInterrupt):
        train(out=folder, checkpoint_every=4, callbacks=[Stop()], **arguments)
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Squares(Dataset[Tensor]):
    """Rows that are made when they are asked for."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __len__(self) -> int:
        return 40

    def __getitem__(self, row: int) -> Tensor:
        return self.factor * points()[row].square()


def cubes(output: Tensor, reference: Tensor) -> Tensor:
    return (output - reference).abs().pow(3).sum(1)


def one_row_changed(row: int) -> Tensor:
    """Return the usual points but for one entry of a row; the first batch holds eight of the forty."""
    changed = points()
    changed[row, 0] += 0.5
    return changed


def other_head(name: str) -> Net:
    """Return the usual network with a tensor of its second layer changed, which `params` leaves out."""
    model = Net()
    model.second.get_parameter(name).data.mul_(1.001)
    return model


def keyed(x: Tensor) -> dict[str, Tensor]:
    return {"x": x}


LAYER: dict[str, Any] = {"params": "first.*"}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # begun with, resumed with, what is named
    "a cache": ({}, {"cache": "store"}, "cache"),
    "no cache": ({"cache": "store"}, {"cache": None}, "cache"),
    "more epochs in the cache": ({"cache": "store"}, {"cache": l3d.GradientCache("new", 2)}, "cache"),
    "fewer epochs in the cache": ({"cache": l3d.GradientCache("store", 2)}, {"cache": "new"}, "cache"),
    **{f"row {row}": ({}, {"data": one_row_changed(row)}, "data") for row in (0, 7, 20, 39)},
    "fewer rows": ({}, {"data": points(39)}, "data"),
    "a mapping": ({"data": keyed(points())}, {"data": keyed(one_row_changed(30))}, "data"),
    "a TensorDataset": ({"data": TensorDataset(points())}, {"data": TensorDataset(one_row_changed(30))}, "data"),
    "a Dataset": ({"data": Squares()}, {"data": Squares(1.0001)}, "data"),
    "batches": ({"data": list(points().split(8))}, {"data": list(one_row_changed(30).split(8))}, "data"),
    "a reference": ({"reference": torch.zeros(3)}, {"reference": torch.ones(3)}, "reference"),
    "the head's weight": (LAYER, {"model": other_head("weight")}, "weights"),
    "the head's bias": (LAYER, {"model": other_head("bias")}, "weights"),
    "the model's code": ({}, {"model": Net(1, torch.tanh)}, "gradients"),
    "the divergence's code": ({"divergence": cubes}, {"divergence": lambda a, b: cubes(a, b) * 1.01}, "gradients"),
    "the divergence's code, of a Dataset": (
        {"divergence": cubes, "data": Squares()},
        {"divergence": lambda a, b: cubes(a, b).square()},
        "gradients",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_no_setting_tells_is_refused_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data, reference, weights outside `params`, code and the cache decide the numbers; one line names what differs."""
    monkeypatch.chdir(tmp_path)
    begun, changes, named = OTHERS[kind]
    files = begin(tmp_path / "run", **begun)
    with pytest.raises(ValueError, match=rf"^resume: .*\b{named}\b.*differ from the interrupted run's; pass") as error:
        train(out=tmp_path / "run", existing="resume", checkpoint_every=4, **{**begun, **changes})
    assert "\n" not in str(error.value)
    assert {str(path): path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "device": lambda: {"device": "cpu"},
    "checkpoint_every": lambda: {"checkpoint_every": 7},
    "callbacks": lambda: {"callbacks": [l3d.callbacks.Callback()]},
    "cache": lambda: {"cache": l3d.GradientCache("store", 4)},  # of all 20 steps, so that none repeats
    "memory": lambda: {"memory": l3d.Memory(recompute=True)},
    "model": lambda: {"model": Net()},
    "data": lambda: {"data": points().clone()},
    "divergence": lambda: {"divergence": "mse"},  # what None has chosen
}


@pytest.mark.parametrize("kind", SAME)
def test_what_changes_no_number_may_change(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on to the same bits."""
    monkeypatch.chdir(tmp_path)
    begin(tmp_path / "run")
    assert_same_bits(train(out=tmp_path / "run", existing="resume", **SAME[kind]()), train())


def test_every_argument_is_decided_on() -> None:
    """Resumed with another value each argument is refused or changes no number; the tests above have all of them."""
    refused = {"k", "lr", "steps", "seed", "rank", "n_subnetworks", "reference", "divergence", "params", "preset"}
    refused |= {"batch_size", "warm_start", "positions", "backend", "n_restarts", "gradients", "dtype"}
    refused |= {"model", "data", "cache"}
    harmless = {"device", "checkpoint_every", "callbacks", "memory", "out", "existing"}
    assert refused | harmless == set(inspect.signature(l3d.decompose).parameters)


@pytest.mark.parametrize("factor", [1.0, 1e-60, 1e-90, 1e90])
def test_micro_batches_may_change_and_rounding_alone_differs(factor: float, tmp_path: Path, float64: None) -> None:
    """Also where the divergence is scaled by a power of two that the first micro-batch decides."""

    def scaled(output: Tensor, reference: Tensor) -> Tensor:
        return factor * (output - reference).square().sum(1)

    rows = points().double() * torch.logspace(0, 9, 40)[:, None]
    chosen: dict[str, Any] = {"data": rows, "divergence": scaled}
    folder = tmp_path / "run"
    begin(folder, model=Net().double(), **chosen)
    memory = l3d.Memory(micro_batch_size=1)
    resumed = train(Net().double(), out=folder, existing="resume", memory=memory, **chosen)
    whole = train(Net().double(), **chosen)
    assert resumed.threshold == pytest.approx(whole.threshold, rel=1e-6)
    assert resumed.history["error"] == pytest.approx(whole.history["error"], rel=1e-6)


def test_rows_that_differ_each_time_are_not_compared(tmp_path: Path) -> None:
    """A Dataset that draws its rows anew cannot be told from another, and is resumed."""

    class Noise(Squares):
        def __getitem__(self, row: int) -> Tensor:
            return torch.randn(4)

    begin(tmp_path / "run", data=Noise())
    assert train(data=Noise(), out=tmp_path / "run", existing="resume").history["step"][-1] == 20


@pytest.mark.parametrize(
    "where, value",
    [
        ("exponent", 1.5),
        ("exponent", "0"),
        ("exponent", 10**400),
        ("seen.norm", "x"),
        ("seen.rows", 3),
        ("seen.cache", -1),
    ],
)
def test_a_checkpoint_of_before_with_values_of_another_kind(where: str, value: Any, tmp_path: Path) -> None:
    """One without checksums, whose state.json was edited: one line with the file's name."""
    begin(tmp_path / "run")
    for path in (tmp_path / "run").rglob("state.json"):
        state = json.loads(path.read_text())
        outer, _, inner = where.rpartition(".")
        (state[outer] if outer else state)[inner] = value
        path.write_text(json.dumps(state))
        (path.parent / "manifest.json").unlink()
    with pytest.raises(ValueError, match=rf"state\.json: .*{where.rpartition('.')[2]}"):
        train(out=tmp_path / "run", existing="resume")


def test_a_checkpoint_that_tells_less_is_resumed(tmp_path: Path) -> None:
    """As one that an older version wrote."""
    begin(tmp_path / "run")
    for path in (tmp_path / "run").rglob("state.json"):
        state = json.loads(path.read_text())
        state.pop("exponent")
        state["recorder"].pop("first_errors")
        state["seen"] = {name: state["seen"][name] for name in ("data", "reference")}
        path.write_text(json.dumps(state))
        (path.parent / "manifest.json").unlink()
    assert_same_bits(train(out=tmp_path / "run", existing="resume"), train())
