"""A run whose losses stay on the device between two rows of the history: the same bits, and errors a bit later."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from l3d.data.batches import Batches
from l3d.train import turn
from l3d.training import history, run, step

from training_runs import Net, assert_same_bits, points, stopping, train


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train as on a GPU: by torch, in rows of seven steps, without a look at the losses between them."""
    monkeypatch.setattr(step, "has_pairs_only", lambda directions: False)
    monkeypatch.setattr(history, "RECORDS", 3)
    monkeypatch.setattr(run, "waits_for", lambda device: False)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "restarts": {"n_restarts": 2},
    "published": {"preset": "published"},
    "revived": {"steps": 450, "k": 0.05, "n_subnetworks": 8},
    "the last row is not full": {"steps": 20},
}


@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_those_of_a_run_that_waits(name: str, unread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors, history, threshold and first error."""
    without = train(**CASES[name])
    monkeypatch.setattr(run, "waits_for", lambda device: True)
    assert_same_bits(without, train(**CASES[name]))


def test_a_resumed_run_too(unread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint between two rows holds what had been left unread."""
    with monkeypatch.context() as patch:
        patch.setattr("l3d.train.turn", stopping(turn, 12))
        with pytest.raises(KeyboardInterrupt):
            train(out=tmp_path / "run", checkpoint_every=4)
    assert_same_bits(train(out=tmp_path / "run", existing="resume", checkpoint_every=4), train())


class Spoilt(Net):
    """Gives NaN for the row that begins with 77, and the same for all rows that begin with zero."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * (x[:, :1] != 0)
        return torch.where(x[:, :1] == 77, float("nan"), y)


def spoilt(row: int, value: float) -> Tensor:
    data = points()
    data[row, 0] = value
    return data


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "NaN in the data": ({"data": spoilt(21, math.nan)}, r"data: row 21 \(from 0\) holds NaN or infinity"),
    "infinity in the data": (
        {"data": spoilt(3, math.inf)},
        r"step \d+: gradients: NaN or infinity in those of",
    ),
    "an output": ({"data": spoilt(30, 77.0)}, r"step \d+: model: its output holds NaN or infinity although"),
    "a step too large": ({"lr": 1e30}, r"step \d+: loss: not finite although the gradients are; lower lr"),
    "nothing in the first": ({"data": torch.zeros(40, 4), "reference": "mean"}, "gradients: all zero in this batch"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_named_as_in_a_run_that_waits(
    name: str, unread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same message with the same step, when a row is due; nothing bad is saved."""
    arguments, message = FAULTS[name]
    with pytest.raises(ValueError, match=message) as late:
        train(Spoilt(), **arguments, out=tmp_path / "run", checkpoint_every=3)
    for path in (tmp_path / "run").rglob("decomposition.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())
    monkeypatch.setattr(run, "waits_for", lambda device: True)
    with pytest.raises(ValueError, match=message) as at_once:
        train(Spoilt(), **arguments)
    assert str(late.value) == str(at_once.value)


def test_a_batch_without_gradients_does_not_count(unread: None) -> None:
    """Its error is in no mean, and the run goes on."""
    data = points()
    data[20:] = 0
    silent = [not batch.any() for batch in map(Batches(data, 2, seed=0).__getitem__, range(20))]
    assert any(silent)
    assert not silent[0]
    d = train(Spoilt(), data, batch_size=2, reference="uniform")
    assert all(torch.isfinite(p).all() for p in d.parameters())
    assert all(0 < error < 2 for error in d.history["error"])


def test_a_stream_is_waited_for(unread: None) -> None:
    """Its batches could not be looked at again."""
    batches = list(points(80).split(8))
    batches[3][5, 2] = math.nan
    with pytest.raises(ValueError, match=r"^step 3: data: row 5 of the batch holds NaN or infinity"):
        train(data=batches)
