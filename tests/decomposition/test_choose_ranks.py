"""Choose ranks from the gradients' spectrum, as singular values of materialised gradients would."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d.cli.main import main
from l3d.decomposition.choose_ranks import ranks_from_gradients
from l3d.decomposition.directions import default_ranks, resolve_ranks
from l3d.gradients.factors import Dense, Gradients, Rows


def planted(rank: int, n_positions: int = 7) -> Gradients:
    """Gradients of a matrix whose rows have one large and some smaller terms: exactly `rank` in each sample."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, n_positions, 12, generator=generator, dtype=torch.float64)
    dy = torch.randn(20, n_positions, 10, generator=generator, dtype=torch.float64)
    dy[:, rank:] = 0
    return Gradients({"w": [Rows(x, dy, 1)]}, {"w": torch.Size([10, 12])}, 20, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_planted_rank_is_found(rank: int) -> None:
    """With everything asked for, the rank is that of the gradients, whatever they span together."""
    g = planted(rank)
    assert np.linalg.matrix_rank(g.materialize()["w"].mean(0).numpy()) == 10  # together they span everything
    assert ranks_from_gradients(g, share=1.0) == {"w": rank}
    assert ranks_from_gradients(g, share=1.0, most=2) == {"w": min(rank, 2)}


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_share_is_held_and_no_less_would_do(share: float) -> None:
    """By numpy's singular values, factored and multiplied out alike."""
    g = planted(7)
    dense = Gradients({"w": [Dense(g.materialize()["w"])]}, g.shapes, 20, g.dtype, g.device)
    energy = np.square(np.linalg.svd(g.materialize()["w"].numpy(), compute_uv=False)).sum(0)
    held = np.cumsum(energy) / energy.sum()
    for each in (g, dense):
        (rank,) = ranks_from_gradients(each, share).values()
        assert held[rank - 1] >= share
        assert rank == 1 or held[rank - 2] < share


def test_tensors_of_higher_order_get_a_rank_per_mode_and_vectors_none() -> None:
    """A convolution's gradients are unfolded along each mode; biases are stored whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(96, 2)).eval()
    g = l3d.extract_gradients(model, torch.randn(6, 3, 6, 6), reference="mean")
    found = ranks_from_gradients(g, share=0.8)
    assert list(found) == ["0.weight", "3.weight"]
    whole = g.materialize()["0.weight"].double().numpy()
    for axis, rank in enumerate(found["0.weight"], 1):
        unfolded = np.moveaxis(whole, axis, 1).reshape(6, whole.shape[axis], -1)
        energy = np.square(np.linalg.svd(unfolded, compute_uv=False)).sum(0)
        held = np.cumsum(energy) / energy.sum()
        assert held[rank - 1] >= 0.8 > (held[rank - 2] if rank > 1 else 0)
    assert found["3.weight"] == 1  # a row is a sample


@pytest.mark.parametrize("stream", [False, True])
def test_decompose_takes_the_ranks_of_its_first_batch(stream: bool, tmp_path: Any) -> None:
    """rank="auto" is the same run as the ranks spelled out, is saved as them, and a stream loses no batch by it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)).eval()
    batches = list(torch.randn(24, 2, 6).split(8))
    data: Any = batches if stream else torch.cat(batches)
    chosen: dict[str, Any] = {"n_subnetworks": 3, "steps": 4, "batch_size": 8, "progress": False}
    auto = l3d.decompose(model, data, rank="auto", **chosen, out=tmp_path / "run")
    ranks = auto.settings["rank"]
    assert ranks["2.weight"] == 1
    assert len(ranks["0.weight"]) == 3
    spelled = l3d.decompose(model, data, rank=ranks, **chosen)
    assert all(torch.equal(a, b) for a, b in zip(auto.parameters(), spelled.parameters(), strict=True))
    assert l3d.load(tmp_path / "run").ranks == auto.ranks
    resumed = l3d.decompose(model, data, rank="auto", **chosen, out=tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(auto.parameters(), resumed.parameters(), strict=True))


def test_bad_arguments_are_named_and_no_gradient_is_rank_one() -> None:
    """Shares and caps out of range are refused; gradients of zero need nothing."""
    g = planted(2)
    for arguments, name in (({"share": 0.0}, "share"), ({"share": 1.5}, "share"), ({"most": 0}, "most")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            ranks_from_gradients(g, **arguments)
    nothing: Tensor = torch.zeros(3, 4, 5)
    zero = Gradients({"w": [Dense(nothing)]}, {"w": torch.Size([4, 5])}, 3, torch.float32, torch.device("cpu"))
    assert ranks_from_gradients(zero) == {"w": 1}


SMALL = {"wide": [9, 12], "narrow": [3, 12], "conv": [12, 2, 3, 3], "bias": [9]}


def test_the_default_rank_is_what_a_small_tensor_allows() -> None:
    """Eight, or less mode by mode; where all tensors are large it is the one number."""
    shapes = {name: torch.Size(shape) for name, shape in SMALL.items()}
    assert resolve_ranks(default_ranks(shapes), shapes) == {
        "wide": (8,),
        "narrow": (3,),
        "conv": (8, 2, 3, 3),
        "bias": (),
    }
    assert default_ranks({"wide": torch.Size([9, 12]), "bias": torch.Size([3])}) == 8


def test_a_rank_is_capped_only_where_none_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python and on the command line; what was taken is saved, and a run folder starts the same run again."""
    model, data = nn.Linear(3, 2), torch.randn(16, 3)
    d = l3d.decompose(model, data, 2, steps=3, progress=False, out=tmp_path / "run")
    assert d.ranks == {"weight": (2,), "bias": ()}
    assert l3d.load(tmp_path / "run").settings["rank"] == {"weight": 2}
    l3d.decompose(model, data, 2, steps=3, progress=False, out=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="rank: 8 exceeds 2"):
        l3d.decompose(model, data, 2, rank=8, steps=3)
    monkeypatch.chdir(tmp_path)
    assert main(["toy", "tms", "--steps", "3", "--describe", "0", "--rank", "8", "--out", "tms"]) == 2
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def model():\n    return torch.nn.Linear(3, 2)\n"
        "def points():\n    return torch.randn(16, 3, generator=torch.Generator().manual_seed(0))\n"
    )
    arguments = ["--model", "python:mine:model", "--data", "python:mine:points", "--steps", "3", "--describe", "0"]
    assert main(["decompose", *arguments, "--out", "one"]) == 0
    assert main(["decompose", "--config", "one/config.yaml", "--out", "two"]) == 0
    assert l3d.load("two").ranks == {"weight": (2,), "bias": ()}
    assert main(["decompose", *arguments, "--rank", "8", "--out", "three"]) == 2
    assert not (tmp_path / "three").exists()
