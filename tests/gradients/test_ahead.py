"""Extract several batches in one pass: the gradients of each batch alone, and runs of the same bits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d.data.batches import Batches
from l3d.gradients import ahead
from l3d.gradients.ahead import Ahead
from l3d.gradients.extract import Extractor
from l3d.training.run import Run

from helpers import assert_relative
from small_models import mlp


class Reader(nn.Module):
    """A language model of a kind: each position sees itself and the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        return self.head(torch.tanh(x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)))


class Mixer(nn.Module):
    """Every row's output depends on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y - y.mean(0, keepdim=True)


class Standardises(nn.Module):
    """Mixes rows before its first parameter, where the graph does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0, keepdim=True))


def reader() -> nn.Module:
    torch.manual_seed(0)
    return Reader()


def points(n: int = 50, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0)).to(dtype)


def doubles() -> Tensor:
    return points(dtype=torch.float64)


def tokens(n: int = 50) -> Tensor:
    return torch.randint(11, (n, 5), generator=torch.Generator().manual_seed(0))


class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows that are mappings; with padding, the second half of some."""

    def __init__(self, padded: bool) -> None:
        self.ids, self.padded = tokens(), padded

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        mask = torch.ones(5, dtype=torch.int64)
        if self.padded and row % 3 == 0:
            mask[3:] = 0
        return {"input_ids": self.ids[row], "attention_mask": mask}


def made(model: nn.Module, data: Any, size: int = 8, **choices: Any) -> tuple[Ahead, Batches, Extractor]:
    extractor = Extractor(model, **choices)
    batches = Batches(data, size, 0)
    device = torch.device("cpu")
    return Ahead(extractor, batches, device, lambda step: torch.Generator().manual_seed(step)), batches, extractor


def labelled() -> Any:
    return torch.utils.data.TensorDataset(doubles(), torch.arange(50))


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "points": (mlp, doubles, {}),
    "labels": (mlp, labelled, {}),
    "mean": (mlp, doubles, {"reference": "mean"}),
    "all positions": (reader, tokens, {"divergence": "kl"}),
    "drawn positions": (reader, tokens, {"divergence": "kl", "positions": 2}),
    "last position": (reader, tokens, {"divergence": "kl", "positions": "last", "params": "table.*"}),
    "mappings": (reader, lambda: Texts(False), {"divergence": "kl"}),
}


@pytest.mark.parametrize("name", CASES)
def test_batches_together_are_as_batches_alone(name: str) -> None:
    """Every step's gradients agree in float64 to 1e-12, from whichever step one begins; the short last batch too."""
    model, data, choices = CASES[name]
    together, batches, extractor = made(model().double(), data(), **choices)
    for step in (9, 2, 0, 6, 13):  # 7 batches an epoch, the last of two rows
        got = together[step].materialize()
        alone = extractor(batches[step], torch.Generator().manual_seed(step)).materialize()
        for parameter in alone:
            assert_relative(got[parameter], alone[parameter], 1e-12)
    assert together.width == ahead.MOST


def counted(monkeypatch: pytest.MonkeyPatch, extractor: Extractor) -> list[int]:
    """Count the rows of every forward pass."""
    rows: list[int] = []
    forward = extractor._forward

    def spy(inputs: Any) -> Tensor:
        output = forward(inputs)
        rows.append(len(output))
        return output

    monkeypatch.setattr(extractor, "_forward", spy)
    return rows


def test_one_pass_serves_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one batch to measure by, 64 steps cost one pass."""
    together, _, extractor = made(mlp(), points(48))
    rows = counted(monkeypatch, extractor)
    for step in range(70):
        together[step]
    assert rows == [8, 8 * 64, 8 * 64]


def test_memory_bounds_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, what the graph keeps and factors of all batches together stay within `BYTES`."""
    together, _, extractor = made(mlp(), points(48))
    rows = counted(monkeypatch, extractor)
    gradients = together[0]
    graph = 4 * 8 * (6 + 6 + 3)  # two layers' outputs and tanh's
    parameters = 4 * (6 * 4 + 3 * 6)  # the transposed weights, which are operations' outputs too
    each = 4 * 8 * 4 + graph + parameters + gradients.nbytes()
    assert 0 < extractor.graph_bytes <= 64 * (graph + parameters)
    for fits in (1, 2, 3):
        monkeypatch.setattr(ahead, "BYTES", fits * each + each // 2)
        again, _, extractor = made(mlp(), points(48))
        rows = counted(monkeypatch, extractor)
        again[1]
        assert again.width == fits
        assert rows[-1] == fits * 8


@pytest.mark.parametrize(
    ("model", "data", "choices"),
    [
        (Mixer, points, {}),
        (Standardises, points, {}),
        (reader, lambda: Texts(True), {"divergence": "kl"}),
        (mlp, lambda: torch.utils.data.TensorDataset(points(), -points()), {"reference": "pair"}),
    ],
    ids=["mixes rows", "mixes inputs", "padding", "pairs"],
)
def test_what_cannot_go_together_goes_alone(model: Any, data: Any, choices: dict[str, Any]) -> None:
    """Models that mix rows, padding and pairs: every step's gradients are to the bit those of its own pass."""
    torch.manual_seed(0)
    together, batches, extractor = made(model(), data(), **choices)
    for step in (0, 3, 8):
        got = together[step].materialize()
        alone = extractor(batches[step], torch.Generator().manual_seed(step)).materialize()
        assert all(torch.equal(got[name], alone[name]) for name in alone)


def test_what_does_not_go_together_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs cost one try, a batch at fault later on one for its sixty-four: rows are not read again and again."""
    pairs = torch.utils.data.TensorDataset(points(), -points())
    together, batches, _ = made(mlp(), pairs, reference="pair")
    read: list[int] = []
    take = Batches.__getitem__
    monkeypatch.setattr(Batches, "__getitem__", lambda self, step: read.append(step) or take(self, step))
    for step in range(5):
        together[step]
    assert together.width == 1
    assert len(read) == 2 + 64 + 4  # to measure by, all that might have gone together, and the other four
    together, batches, extractor = made(mlp(), points())
    several = extractor.several

    def fails(*given: Any) -> Any:
        if len(read) > 64:
            raise ValueError("a row at fault")
        return several(*given)

    read.clear()
    together[0]
    monkeypatch.setattr(extractor, "several", fails)
    read.extend([0] * 65)
    before = len(read)
    for step in range(64, 74):
        together[step]
    assert len(read) - before == 64 + 10


ARGUMENTS: dict[str, Any] = {"n_subnetworks": 4, "rank": 2, "k": 0.3, "steps": 90, "batch_size": 8, "progress": False}


def test_an_interrupted_run_goes_on_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is resumed in the middle of what was extracted together ends as one that was not interrupted."""
    whole = l3d.decompose(mlp(), points(), **ARGUMENTS)
    step, taken = Run.take_step, []

    def stops(self: Run, *given: Any) -> bool:
        taken.append(1)
        if len(taken) == 77:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(Run, "take_step", stops)
    with pytest.raises(KeyboardInterrupt):
        l3d.decompose(mlp(), points(), out=tmp_path / "run", checkpoint_every=10, **ARGUMENTS)
    monkeypatch.undo()
    resumed = l3d.decompose(mlp(), points(), out=tmp_path / "run", checkpoint_every=10, resume=True, **ARGUMENTS)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


@pytest.mark.parametrize("reads", ["on", "off", "auto"])
def test_a_cache_gives_the_same_bits(reads: str, tmp_path: Path) -> None:
    """Whether gradients are read or extracted, and wherever the store ends within what goes together."""
    choices = {**ARGUMENTS, "cache": tmp_path / "store", "n_references": 3}
    first = l3d.decompose(mlp(), points(), **choices, cache_reads="off")
    again = l3d.decompose(mlp(), points(), **choices, cache_reads=reads)
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_the_step_at_fault_is_named() -> None:
    """A batch that cannot be extracted ends the run at its own step, not at the first that goes with it."""

    class Fails(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 40

        def __getitem__(self, row: int) -> Tensor:
            return points(40)[row] * (float("nan") if row == 17 else 1.0)

    order = torch.randperm(40, generator=torch.Generator().manual_seed(l3d.data.batches.mix(0, 0)))
    at = int((order == 17).nonzero()) // 8
    with pytest.raises(ValueError, match=f"step {at}\\b"):
        l3d.decompose(mlp(), Fails(), **ARGUMENTS)
