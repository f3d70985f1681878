"""Compare intervention ratios with a loop by definition, and check them on circuits that are known."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import l3d
from l3d.analysis.intervention_ratios import InterventionRatios, alike
from l3d.api import Decomposition
from l3d.cli.main import main
from l3d.data.readers import TokenRows

from helpers import assert_relative


class Reader(nn.Module):
    """Tokens to logits at every position; later positions see earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.mixer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + torch.tanh(self.mixer(x.cumsum(1))))


def random_decomposition(model: nn.Module, params: str, K: int, **settings: Any) -> Decomposition:
    shapes = {name: p.shape for name, p in model.named_parameters() if name.startswith(params)}
    chosen = {"k": 0.3, "reference": "uniform", "batch_size": 5, "seed": 0, "positions": "all", **settings}
    return Decomposition(shapes, K, 2, chosen, torch.Generator().manual_seed(3)).double()


def kept_by_hand(d: Decomposition, model: nn.Module, batches: list[Tensor]) -> Tensor:
    """Which samples keep which subnetwork, from the gradients multiplied out: [S, K] bool."""
    encoder = [d.encoder.tensors(k) for k in range(d.n_subnetworks)]
    kept = []
    for batch in batches:
        g = l3d.extract_gradients(
            model, batch, d.settings["divergence"], "uniform", params=d.parameter_names
        ).materialize()
        c = torch.stack([sum((g[name] * v[name]).flatten(1).sum(1) for name in g) for v in encoder], 1).detach()
        n = math.floor(0.3 * c.numel() + 0.5)
        kept.append(c.abs() >= c.abs().flatten().sort(descending=True).values[n - 1])
    return torch.cat(kept)


@pytest.mark.usefixtures("float64")
def test_output_changes_are_those_of_the_definition() -> None:
    """With room for every sample, the changes are the mean KL of the moved outputs over exactly the kept samples."""
    model = Reader().eval()
    d = random_decomposition(model, "mixer", 4, divergence="kl")
    data = torch.randint(9, (15, 3), generator=torch.Generator().manual_seed(1))
    found = l3d.intervention_ratios(d, model, data, deltas=[-0.5, 0.2], n_rows=15, n_samples=45, min_active=1)
    kept = kept_by_hand(d, model, list(data.split(5)))
    with torch.no_grad():
        before = model(data).log_softmax(-1).flatten(0, 1)
        for i, k in enumerate(found.subnetworks.tolist()):
            for j, delta in enumerate((-0.5, 0.2)):
                with l3d.intervene(model, d, {k: delta}):
                    after = model(data).log_softmax(-1).flatten(0, 1)
                change = (before.exp() * (before - after)).sum(1)
                assert float(found.active[i, j]) == pytest.approx(float(change[kept[:, k]].mean()), rel=1e-9)
                assert float(found.rest[i, j]) == pytest.approx(float(change[~kept[:, k]].mean()), rel=1e-9)
            assert float(found.activation_rate[i]) == pytest.approx(float(kept[:, k].double().mean()))
    assert_relative(found.ratio, (found.active / found.rest).prod(1).sqrt(), 1e-12)


@pytest.mark.usefixtures("float64")
def test_drawn_positions_are_measured_where_they_lie() -> None:
    """With some positions drawn per row, the samples are at those: the change of a draw of all is that of all."""
    model = Reader().eval()
    data = torch.randint(9, (10, 3), generator=torch.Generator().manual_seed(1))
    every, drawn = (
        l3d.intervention_ratios(
            random_decomposition(model, "mixer", 4, divergence="kl", positions=positions, k=0.5),
            model, data, deltas=[0.3], n_samples=99, min_active=1,
        )
        for positions in ("all", 3)
    )  # fmt: skip
    assert torch.equal(every.subnetworks, drawn.subnetworks)
    assert torch.allclose(every.active, drawn.active, rtol=1e-12)
    assert torch.allclose(every.random_rest, drawn.random_rest, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_part_that_some_samples_do_not_use_moves_them_not_at_all() -> None:
    """A subnetwork in the column of an input that is zero for the rest has an infinite ratio; a random one has not."""
    model = nn.Linear(2, 3, bias=False).eval()
    d = Decomposition(
        {"weight": model.weight.shape}, 1, 1, {"k": 0.5, "reference": "uniform", "batch_size": 20}
    ).double()
    with torch.no_grad():
        for side in (d.encoder, d.decoder):
            side.pieces[0].right.copy_(torch.tensor([1.0, 0.0]))
        d.normalize_()
    data = torch.zeros(20, 2)
    data[torch.arange(20), torch.arange(20) % 2] = 1.0
    found = l3d.intervention_ratios(d, model, data)
    assert found.active.min() > 0
    assert found.rest.abs().max() == 0
    assert found.ratio.tolist() == [math.inf]
    assert 0 < float(found.random_ratio) < math.inf
    assert found.share_above_random == 1.0


def test_a_model_that_rounds_small_steps_away_is_warned_of() -> None:
    """In bfloat16 most weights stay as they are at default distances, and what is measured is rounding."""
    made = l3d.toys.make("tms")
    model = copy.deepcopy(made.model).bfloat16()
    d = l3d.decompose(model, made.data.bfloat16(), 5, rank=1, k=0.1, steps=20, progress=False)
    with pytest.warns(UserWarning, match=r"holds torch.bfloat16, which rounds such small steps away; measure on"):
        l3d.intervention_ratios(d, model, made.data.bfloat16(), n_rows=200)
    l3d.intervention_ratios(d, model.float(), made.data, n_rows=200, any_weights=True)


@pytest.mark.usefixtures("float64")
def test_the_random_direction_is_of_the_same_form() -> None:
    """It has the subnetwork's norm in every tensor, the decomposition's rank, and is another for every draw."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    d = random_decomposition(model, "", 2, divergence="mse")
    own = d.subnetwork(1)
    generator = torch.Generator().manual_seed(0)
    first, second = alike(own, d, generator), alike(own, d, generator)
    for name, v in first.items():
        assert float(v.detach().norm()) == pytest.approx(float(own[name].norm()))
        if v.ndim == 2:
            assert int(torch.linalg.matrix_rank(v)) == 2
            cos = F.cosine_similarity(v.flatten(), second[name].flatten(), dim=0)
            assert abs(float(cos)) < 0.9


def test_every_circuit_of_the_toy_beats_chance(toy: tuple[Any, Decomposition]) -> None:
    """On the toy model of superposition each subnetwork moves its own samples more than a random direction does."""
    made, d = toy
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    found = l3d.intervention_ratios(d, made.model, made.data, n_rows=1000)
    assert found.subnetworks.tolist() == [0, 1, 2, 3, 4]
    assert found.share_above_random == 1.0
    assert found.ratio.min() > 5
    assert all(torch.equal(value, before[name]) for name, value in made.model.state_dict().items())
    again = l3d.intervention_ratios(d, made.model, made.data, n_rows=1000)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_only_the_chosen_tensors_are_moved(toy: tuple[Any, Decomposition]) -> None:
    """With a glob, the changes are those of `intervene` with the same glob."""
    made, d = toy
    found = l3d.intervention_ratios(d, made.model, made.data, deltas=[0.5], params="W_in.*")
    everywhere = l3d.intervention_ratios(d, made.model, made.data, deltas=[0.5])
    assert isinstance(found, InterventionRatios)
    assert (found.active < everywhere.active).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_rows": 0}, "n_rows: expected a positive whole number, got 0"),
        ({"deltas": [0.0, 1.0]}, "deltas: expected distances other than 0"),
        ({"deltas": []}, "deltas: expected distances other than 0"),
        ({"params": "b*"}, "params: no parameter matches"),
        ({"min_active": 600}, "data: no subnetwork is active for 600 of its 256 samples"),
    ],
)
def test_bad_arguments_are_named(toy: tuple[Any, Decomposition], arguments: dict[str, Any], message: str) -> None:
    """A mistake raises ValueError that names the argument."""
    made, d = toy
    with pytest.raises(ValueError, match=message):
        l3d.intervention_ratios(d, made.model, made.data, **arguments)


def test_rows_of_several_shapes_are_refused() -> None:
    """Batches of texts of different lengths cannot be drawn from together."""
    model = Reader().eval()
    d = random_decomposition(model, "mixer", 2, divergence="kl").float()
    data = [torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 5, dtype=torch.int64)]
    with pytest.raises(ValueError, match="data: expected rows of one shape"):
        l3d.intervention_ratios(d, model, data)


def test_the_command_writes_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`l3d intervene` leaves interventions.json and a plot, of a run and of a control beside it, in a copy if asked."""
    short = ["--steps", "20", "--n_restarts", "1", "--evaluate_rows", "64"]
    assert main(["toy", "tms", *short, "--out", str(tmp_path / "run")]) == 0
    assert main(["toy", "tms", *short, "--shuffle", "true", "--out", str(tmp_path / "torn")]) == 0
    arguments = ["intervene", str(tmp_path / "run"), "--control", str(tmp_path / "torn"), "--rows", "200"]
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "copy")]) == 0
    assert "above the random direction: " in capsys.readouterr().out
    written = json.loads((tmp_path / "copy" / "interventions.json").read_text())
    made = l3d.toys.make("tms")
    for found, name in ((written, "run"), (written["control"], "torn")):
        expected = l3d.intervention_ratios(l3d.load(tmp_path / name), made.model, made.data, n_rows=200)
        assert found["subnetworks"] == expected.subnetworks.tolist()
        assert found["ratio"] == pytest.approx(expected.ratio.tolist())
        assert found["share_above_random"] == expected.share_above_random
    assert {"interventions.svg", "interventions.png"} <= {path.name for path in (tmp_path / "copy").iterdir()}
    assert not (tmp_path / "run" / "interventions.json").exists()


class Masked(Reader):
    """The same, of rows with an attention mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids * attention_mask)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("positions", ["all", "last", 3])
def test_padding_is_no_sample(positions: str | int) -> None:
    """Where every row is padded to twice its length, what is measured is what is without padding."""
    model = Reader().eval()
    masked = Masked().eval()
    masked.load_state_dict(model.state_dict())
    ids = torch.randint(1, 9, (10, 3), generator=torch.Generator().manual_seed(1))
    padded = TokenRows(torch.cat([ids, ids], 1), torch.tensor([[1, 1, 1, 0, 0, 0]]).expand(10, -1))
    plain, found = (
        l3d.intervention_ratios(
            random_decomposition(each, "mixer", 4, divergence="kl", positions=positions, k=0.5),
            each, data, deltas=[0.3], n_samples=99, min_active=1,
        )
        for each, data in ((model, ids), (masked, padded))
    )  # fmt: skip
    assert torch.equal(plain.subnetworks, found.subnetworks)
    for field in ("activation_rate", "active", "rest", "random_active", "random_rest"):
        assert torch.allclose(getattr(plain, field), getattr(found, field), rtol=1e-9), field


def test_ratios_are_shown_in_one_line() -> None:
    """Sizes, median ratios and the share above random, never the arrays."""
    one = torch.ones(3, 2, dtype=torch.float64)
    found = InterventionRatios(torch.ones(2), torch.arange(3), torch.ones(3), 4 * one, one, one / 2, one)
    assert repr(found) == (
        "InterventionRatios(3 subnetworks, 2 deltas; median ratio 4, random 0.5; share_above_random 1)"
    )
