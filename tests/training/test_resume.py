"""Resume interrupted runs: to the bit, and refused where the arguments changed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

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
