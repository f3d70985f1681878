"""Compare what l3d.describe says of each subnetwork with plain definitions."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import l3d
from l3d.analysis.description import N_MOVED, N_REFERENCES, N_SHOWN, default_rows
from l3d.analysis.view import View
from l3d.analysis.words import N_ENTRIES
from l3d.api import Decomposition
from l3d.gradients.divergence import kl
from l3d.report.table import make_table

from helpers import assert_relative
from small_models import Classifier, OneWay, Tiny


def untrained(model: nn.Module, n: int = 4, **settings: Any) -> Decomposition:
    """Return a decomposition as training would leave it, but random."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    defaults = {"divergence": "kl", "reference": "sample", "positions": "all", "batch_size": 5, "seed": 0, "k": 0.5}
    d = Decomposition(shapes, n, 2, defaults | settings, torch.Generator().manual_seed(1))
    d.to(next(model.parameters()).dtype).normalize_()
    return d


@pytest.fixture
def texts() -> Tensor:
    """Rows that share their first token and no second."""
    first, second = torch.zeros(10, 1, dtype=torch.int64), torch.arange(1, 11)[:, None]
    return torch.cat([first, second, torch.randint(1, 11, (10, 5), generator=torch.Generator().manual_seed(0))], 1)


def close(found: float, expected: Any) -> None:
    """Assert that four figures of a number are right."""
    assert found == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.usefixtures("float64")
def test_a_language_model_is_described_by_its_impacts_and_logits(texts: Tensor) -> None:
    """Impacts, contexts, shades and derivatives are those of impact and top_logits at the marked positions."""
    model = Tiny().eval()
    d = untrained(model)
    found = l3d.describe(
        d, model, texts, view=View(tokens=lambda ids: [f" t{i}" for i in ids]), activation_rate=[0.5] * 4
    )
    assert found == json.loads(json.dumps(found, allow_nan=False))
    assert (found["kind"], found["moved"], found["n_rows"], found["n_samples"]) == ("text", "probability", 10, 70)
    impacts = d.impact(model, texts, N_REFERENCES).view(10, 7, 4)
    beginning = impacts[:, 0].mean(0)  # the first token is in all rows the same
    for k, seen in enumerate(found["subnetworks"]):
        close(seen["impact"], impacts[..., k].mean())
        assert len({top["row"] for top in seen["top"]}) == len(seen["top"]) == N_SHOWN
        assert seen["norms"] == [pytest.approx(float(t.norm()), rel=1e-3) for t in d.subnetwork(k).values()]
        moved = []
        for i, top in enumerate(seen["top"]):
            row, position = top["row"], top["position"]
            close(top["impact"], beginning[k] if position == 0 else impacts[row, position, k])
            assert top["tokens"] == texts[row].tolist()
            shares = 100 * impacts[row, :, k] / seen["top"][0]["impact"]
            assert top["shares"] == pytest.approx(shares.clamp(0, 100).tolist(), abs=0.6)
            if i < N_MOVED:
                every = l3d.top_logits(model, d, k, texts[row : row + 1], n=11)
                dense = torch.empty(11).scatter_(0, every.raised[0, position], every.raised_by[0, position])
                moved.append(dense)
                assert top["predicted"] == int(model(texts[row : row + 1])["logits"][0, position].argmax())
                entry, value = top["raised"][0]
                assert entry == int(dense.argmax())
                close(value, dense.max())
        mean = torch.stack(moved).mean(0)
        assert len(seen["raised"]) <= N_ENTRIES
        for side, sign in (("raised", 1), ("lowered", -1)):
            assert [entry for entry, _ in seen[side]] == (sign * mean).argsort(descending=True)[
                : len(seen[side])
            ].tolist()
            assert_relative([value for _, value in seen[side]], mean[[entry for entry, _ in seen[side]]], 1e-3)
    named = {entry for seen in found["subnetworks"] for entry, _ in seen["raised"]}
    assert all(found["tokens"][str(entry)] == f" t{entry}" for entry in named)


@pytest.mark.usefixtures("float64")
def test_positions_that_were_drawn_in_training_are_all_described(texts: Tensor) -> None:
    model = Tiny().eval()
    drawn = l3d.describe(untrained(model, positions=2), model, texts)
    assert drawn["subnetworks"] == l3d.describe(untrained(model), model, texts)["subnetworks"]
    last = l3d.describe(untrained(model, positions="last"), model, texts)
    assert {top["position"] for seen in last["subnetworks"] for top in seen["top"]} == {6}
    assert last["n_samples"] == 10


class TokenClassifier(nn.Module):
    """Maps rows of tokens [B, T] to classes [B, 3], so that a row is one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).tanh().mean(1))


@pytest.mark.parametrize("divergence", ["kl", "mse"])
def test_a_row_of_tokens_that_is_one_sample_has_no_mark_and_names_classes(texts: Tensor, divergence: str) -> None:
    """Entries of its output are classes, or outputs, never tokens; a language model's are tokens."""
    torch.manual_seed(0)
    model = TokenClassifier().eval()
    view = View(tokens=lambda ids: [f"t{i}" for i in ids], classes=["bad", "so", "good"])
    found = l3d.describe(untrained(model, divergence=divergence), model, texts, view=view)
    assert (found["kind"], found["entries"]) == ("text", {"kl": "classes", "mse": "outputs"}[divergence])
    assert set(found["classes"].values()) <= {"bad", "so", "good"}
    assert set(found["tokens"]) == {
        str(i) for seen in found["subnetworks"] for top in seen["top"] for i in top["tokens"]
    }
    for top in found["subnetworks"][0]["top"]:
        assert "position" not in top
        assert top["tokens"] == texts[top["row"]].tolist()
    table = make_table(untrained(model), None, found)
    assert table.acts == "acts on rows of"
    named = {name for row in table.rows for name in (*row.acts, *row.raised, *row.lowered)}
    assert named
    assert named <= {"bad", "so", "good"}
    assert l3d.describe(untrained(Tiny()), Tiny().eval(), texts)["entries"] == "tokens"


def test_a_divergence_that_is_not_saved_is_passed_again(texts: Tensor) -> None:
    """A callable's positions are samples too, so the entries are tokens."""
    model = Tiny().eval()
    d = untrained(model, divergence="mine")
    with pytest.raises(ValueError, match="pass divergence="):
        l3d.describe(d, model, texts)
    found = l3d.describe(d, model, texts, divergence=kl)
    assert (found["entries"], found["moved"]) == ("tokens", "probability")
    found = l3d.describe(d, model, texts, divergence=lambda f, y: (f - y).square().sum(-1), reference="mean")
    assert (found["entries"], found["moved"], found["n_samples"]) == ("tokens", "output", 70)


class Labelled(Dataset):
    """Images with a label beside each."""

    classes = ("cat", "dog", "frog", "ship")

    def __init__(self) -> None:
        self.images = torch.randn(10, 3, 5, 5, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], i % 4


def test_images_have_pictures_and_classes_and_any_source_does() -> None:
    """A Dataset with labels, a tensor and a list of batches give the same."""
    torch.manual_seed(0)
    model = Classifier().eval()
    d = untrained(model)
    view = View(classes=Labelled.classes)
    found = l3d.describe(d, model, Labelled(), view=view)
    assert found["kind"] == "image"
    assert set(found["classes"].values()) <= set(Labelled.classes)
    shown = {str(top["row"]) for seen in found["subnetworks"] for top in seen["top"]}
    assert set(found["rows"]) == shown
    assert all(row["png"] for row in found["rows"].values())
    assert l3d.describe(d, model, Labelled().images, view=view) == found
    assert l3d.describe(d, model, list(DataLoader(Labelled(), batch_size=5)), view=view) == found


def test_points_hold_their_numbers_and_outputs_move_by_themselves() -> None:
    """A regression's outputs are no probabilities; a model without forward mode is described too."""
    torch.manual_seed(0)
    model, points = OneWay().eval(), torch.randn(9, 4)
    d = untrained(model, divergence="mse")
    found = l3d.describe(d, model, points, intervention_ratio=[2.0, None, 3.5, 1.0])
    assert (found["kind"], found["moved"]) == ("point", "output")
    for row, seen in found["rows"].items():
        assert seen["point"] == pytest.approx(points[int(row)].tolist(), rel=1e-3)
    assert [seen["intervention_ratio"] for seen in found["subnetworks"]] == [2.0, None, 3.5, 1.0]


def test_few_rows_are_taken_evenly() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    found = l3d.describe(untrained(model, divergence="mse"), model, torch.randn(40, 4), n_rows=8)
    assert found["n_rows"] == 8
    assert {row["number"] for row in found["rows"].values()} <= set(range(0, 40, 5))
    with pytest.raises(ValueError, match="n_rows: expected at least 2, got 1"):
        l3d.describe(untrained(model, divergence="mse"), model, torch.randn(40, 4), n_rows=1)


def test_rows_are_even_where_memory_allows_but_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first ones: what can be held is spread over the data too."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    d = untrained(model, divergence="mse")
    monkeypatch.setattr(l3d.analysis.description, "IMPACTS_AT_ONCE", 8 * d.n_subnetworks)
    for data in (torch.randn(40, 4), TensorDataset(torch.randn(40, 4))):
        found = l3d.describe(d, model, data, n_rows=20)
        assert found["n_rows"] == 8
        assert {row["number"] for row in found["rows"].values()} <= {0, 4, 10, 14, 20, 24, 30, 34}


def test_a_mapping_of_tensors_is_described_as_a_dataset_is() -> None:
    """Rows by name, as decompose and the rest take them; also where each is a token row with its mask."""
    torch.manual_seed(0)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model, rows = Named().eval(), torch.randn(30, 4)
    d = untrained(model, divergence="mse")

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"x": rows[index]}

    assert l3d.describe(d, model, {"x": rows}, n_rows=10) == l3d.describe(d, model, Rows(), n_rows=10)


def test_the_rows_looked_at_are_few_beside_those_trained_on() -> None:
    assert [default_rows(steps, 16) for steps in (30, 500, 1500)] == [256, 400, 1000]
