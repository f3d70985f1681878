"""Start runs from gradients of samples with start="data"."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import l3d

from helpers import assert_relative
from training_runs import Net, assert_same_bits, differ, interrupt, points, train

pytestmark = pytest.mark.usefixtures("one_batch_at_a_time")


def test_a_start_from_data_is_reproducible_and_another() -> None:
    """The seed decides it; it differs from the random start and from that of another seed, and restarts differ."""
    runs = [train(start="data", steps=3, seed=seed) for seed in (0, 0, 1)]
    assert_same_bits(runs[0], runs[1])
    assert differ(runs[0], runs[2])
    assert differ(runs[0], train(start="random", steps=3))
    assert_same_bits(train(start="random", steps=3), train(steps=3))
    assert len(set(train(start="data", steps=3, n_restarts=3).restart_errors)) == 3


@pytest.mark.parametrize("n_subnetworks", [1, 5, 19])
def test_a_start_from_data_is_gradients_of_samples(
    n_subnetworks: int, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    """Without the random part and at full rank every subnetwork is some sample's gradient, in encoder and decoder."""
    monkeypatch.setattr("l3d.training.start.NOISE", 0.0)
    x = points(8).double()
    arguments = {"reference": "mean", "steps": 1, "lr": 1e-12, "rank": {"first.weight": 4, "second.weight": 3}}
    d = train(Net().double(), x, n_subnetworks=n_subnetworks, start="data", **arguments)
    gradients = l3d.extract_gradients(Net().double(), x, reference="mean").materialize()
    flat = torch.cat([grad.flatten(1) for grad in gradients.values()], 1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    for side in (d.encoder, d.decoder):
        directions = [torch.cat([t.flatten() for t in side.tensors(k).values()]) for k in range(n_subnetworks)]
        cosines = torch.stack(directions).detach() @ flat.mT  # of their own sign
        assert_relative(cosines.amax(1), torch.ones(n_subnetworks), 1e-9)
        used = cosines.argmax(1).bincount(minlength=8)
        assert used.max() - used.min() <= 1 or n_subnetworks < 8  # none again before all have been


@pytest.mark.parametrize("kind", ["list", "loader", "generator", "dataset"])
def test_every_kind_of_data_can_be_started_from(kind: str) -> None:
    """Streams of batches are as good as rows, and no batch of them is lost: a list and a generator agree."""
    x = points()
    data = {
        "list": lambda: list(x.split(8)),
        "loader": lambda: DataLoader(x, batch_size=8),
        "generator": lambda: (x[8 * (i % 5) : 8 * (i % 5) + 8] for i in range(20)),
        "dataset": lambda: TensorDataset(x),
    }
    d = train(data=data[kind](), start="data")
    assert d.history["step"][-1] == 20
    assert_same_bits(d, train(data=x if kind == "dataset" else list(x.split(8)), start="data"))


def test_a_start_from_data_is_better_than_a_random_one() -> None:
    """The first error of training, with everything kept, is lower than from a random start."""
    first = {start: train(start=start, steps=2, warm_start=1).history["error"][0] for start in ("random", "data")}
    assert first["data"] < first["random"]


@pytest.mark.parametrize("n_restarts", [1, 2])
def test_resuming_a_run_that_started_from_data(n_restarts: int, tmp_path: Path) -> None:
    """The start is not drawn again over what was learned: the same bits as in one go."""
    arguments = {"start": "data", "checkpoint_every": 4, "n_restarts": n_restarts}
    with pytest.raises(KeyboardInterrupt):
        train(Net(14, interrupt), out=tmp_path / "run", **arguments)
    assert_same_bits(train(out=tmp_path / "run", resume=True, **arguments), train(**arguments))
