"""Check the divergence that None means: kl for outputs with .logits [B, T, V], else mse."""

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import l3d
from l3d import callbacks
from l3d.cli.main import main
from l3d.estimate import estimate
from l3d.gradients.divergence import default_divergence
from l3d.gradients.extract import Extractor
from l3d.gradients.microbatch import Microbatches

B, T, V = 6, 4, 5


class Model(nn.Module):
    """Map token ids [B, T] to [B, T, V] by an embedding and a layer, and wrap that; counts its passes."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(V, 3), nn.Linear(3, V)
        self.wrap, self.made = wrap, SimpleNamespace(passes=0)

    def forward(self, input_ids: Tensor) -> Any:
        self.made.passes += 1
        return self.wrap(self.layer(self.embed(input_ids)))


class Output(OrderedDict[str, Tensor]):
    """A mapping whose entries are attributes too, as transformers returns it."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "attribute": (lambda x: SimpleNamespace(logits=x), "kl"),
    "mapping": (lambda x: {"loss": x.mean(), "logits": x}, "kl"),
    "both": (lambda x: Output(logits=x), "kl"),
    "attribute of a mapping": (lambda x: type("Has", (dict,), {"logits": x})(), "kl"),
    "tensor": (lambda x: x, "mse"),
    "tensor [B, V]": (lambda x: x.mean(1), "mse"),
    "logits [B, V]": (lambda x: SimpleNamespace(logits=x.mean(1)), "mse"),
    "logits [B, T, V, 1]": (lambda x: Output(logits=x[..., None]), "mse"),
    "logits [B, T, 1]": (lambda x: {"logits": x[..., :1]}, "mse"),  # one entry has no distribution
}
IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
CHOSEN: dict[str, Any] = {"n_subnetworks": 3, "rank": 1, "k": 0.5, "steps": 5, "batch_size": 3}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def train(model: nn.Module, data: Any = IDS, **changes: Any) -> l3d.Decomposition:
    return l3d.decompose(model, data, **{**CHOSEN, "callbacks": [], **changes})


@pytest.mark.parametrize("kind", OUTPUTS)
def test_gradients_are_those_of_the_divergence_by_name(kind: str) -> None:
    """To the bit, in as many passes; kl has a sample at every position, mse one in every row."""
    wrap, name = OUTPUTS[kind]
    model, spelled = Model(wrap), Model(wrap)
    found = l3d.extract_gradients(model, IDS, generator=generator())
    expected = l3d.extract_gradients(spelled, IDS, name, generator=generator())
    assert found.n_samples == (B * T if name == "kl" else B)
    for ours, theirs in zip(found.materialize().values(), expected.materialize().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert model.made.passes == spelled.made.passes


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_run_stores_what_was_chosen(kind: str, tmp_path: Path) -> None:
    """Trained, saved, evaluated and resumed by that name, to the bits of a run that gave it; said in one line."""
    wrap, name = OUTPUTS[kind]
    notes: list[str] = []

    class Notes(callbacks.Callback):
        def on_note(self, line: str) -> None:
            notes.append(line)

    model, spelled = Model(wrap), Model(wrap)
    d = train(model, out=tmp_path / "run", callbacks=[Notes()])
    expected = train(spelled, divergence=name, callbacks=[Notes()])
    assert model.made.passes == spelled.made.passes
    has = "have .logits [B, T, V]" if name == "kl" else "have no .logits [B, T, V]"
    assert notes == [f"divergence: {name}, as the model's outputs {has}"]
    assert d.settings == expected.settings == l3d.load(tmp_path / "run").settings
    assert d.settings["divergence"] == name
    assert json.loads((tmp_path / "run" / "decomposition.json").read_text())["settings"]["divergence"] == name
    for ours, theirs in zip(d.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    scores = [each.evaluate(Model(wrap), IDS) for each in (d, expected)]
    assert scores[0].error == scores[1].error
    assert scores[0].n_samples == (B * T if name == "kl" else B)
    again = train(Model(wrap), out=tmp_path / "run", existing="resume", divergence=name)
    assert again.settings == d.settings
    other = "mse" if name == "kl" else "mse_published"
    with pytest.raises(ValueError, match="resume: divergence differ"):
        train(Model(wrap), out=tmp_path / "run", existing="resume", divergence=other)


@pytest.mark.parametrize("kind", ["attribute", "both", "tensor", "logits [B, V]"])
@pytest.mark.parametrize(
    "changes",
    [{"rank": "auto"}, {"memory": l3d.Memory(micro_batch_size=2)}, {"n_restarts": 2}, {"cache": "store"}],
    ids=lambda changes: next(iter(changes)),
)
def test_with_every_way_to_begin(
    changes: dict[str, Any], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks, micro-batches and the cache's identity look at a first batch before others do."""
    monkeypatch.chdir(tmp_path)
    wrap, name = OUTPUTS[kind]
    d = train(Model(wrap), **changes)
    expected = train(Model(wrap), divergence=name, **changes)
    assert d.settings == expected.settings
    assert all(torch.equal(a, b) for a, b in zip(d.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["attribute", "both", "tensor", "logits [B, V]"])
def test_no_batch_of_a_stream_is_used_up(kind: str) -> None:
    """A stream of just as many batches as there are steps suffices, and each is trained on."""
    wrap, name = OUTPUTS[kind]

    def batches() -> Iterator[Tensor]:
        for i in range(CHOSEN["steps"]):
            yield torch.randint(V, (3, T), generator=torch.Generator().manual_seed(i))

    d = train(Model(wrap), data=batches())
    expected = train(Model(wrap), data=batches(), divergence=name)
    assert d.history["step"] == [1, 2, 3, 4, 5]
    assert d.history["error"] == expected.history["error"]


@pytest.mark.parametrize("kind", ["attribute", "mapping", "tensor", "logits [B, V]"])
def test_parts_of_a_batch_and_pairs(kind: str) -> None:
    """The outputs that other rows' references need are looked at first; of a pair the input is."""
    wrap, name = OUTPUTS[kind]
    for reference, batch in (("sample", IDS), ("pair", (IDS, IDS.flip(0)))):
        found = []
        for divergence in (None, name):
            extractor = Extractor(Model(wrap), divergence, reference)
            size = 2 if reference == "sample" else None
            parts = Microbatches(extractor, batch, generator, size, None)
            found.append([grad for i in range(len(parts)) for grad in parts(i).materialize().values()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_later_batch_changes_nothing() -> None:
    """The first output decides, so a run cannot go from one divergence to another."""
    model = Model(lambda x: SimpleNamespace(logits=x))
    extractor = Extractor(model)
    extractor(IDS, generator())
    assert extractor.is_kl
    model.wrap = lambda x: x
    assert extractor(IDS, generator()).n_samples == B * T


def test_positions_are_checked_with_the_first_output() -> None:
    """As they are where kl was given by name."""
    with pytest.raises(ValueError, match=r"positions: expected at most the output's 4, got 9"):
        l3d.extract_gradients(Model(lambda x: {"logits": x}), IDS, positions=9)
    assert l3d.extract_gradients(Model(lambda x: {"logits": x}), IDS, positions="last").n_samples == B


def test_an_estimate_takes_the_steps_of_what_is_chosen() -> None:
    found = estimate(Model(lambda x: {"logits": x}), IDS, **CHOSEN)
    assert found.n_samples == CHOSEN["batch_size"] * T


def test_by_hand() -> None:
    """The rule itself, on what a model may return."""
    assert default_divergence(torch.zeros(2, 3, 4)) == "mse"
    assert default_divergence(SimpleNamespace(logits="text")) == "mse"
    assert default_divergence(Output(logits=torch.zeros(2, 3, 4))) == "kl"


FACTORY = """
import torch
from torch import nn

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, x):
        return {"logits": self.layer(self.embed(x))}

class Plain(Language):
    def forward(self, x):
        return super().forward(x)["logits"]

def data():
    return torch.randint(5, (12, 4), generator=torch.Generator().manual_seed(0))
"""


@pytest.mark.parametrize("model, name", [("Language", "kl"), ("Plain", "mse")])
@pytest.mark.parametrize("given", [[], ["--divergence", "null"]], ids=["left out", "null"])
def test_the_command_line_says_and_stores_it(
    given: list[str],
    model: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """config.yaml names it, so that a run made again by it, evaluated or resumed has the same."""
    (tmp_path / "made_here.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = ["--model", f"python:made_here:{model}", "--data", "python:made_here:data"]
    chosen = ["--n_subnetworks", "3", "--rank", "1", "--steps", "4", "--batch_size", "4", "--describe", "0"]
    assert main(["decompose", *source, *chosen, *given, "--out", "run"]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("divergence: ")]
    has = "have .logits" if name == "kl" else "have no .logits"
    assert lines == [f"divergence: {name}, as the model's outputs {has} [B, T, V]"]
    assert yaml.safe_load(Path("run/config.yaml").read_text())["divergence"] == name
    assert l3d.load("run").settings["divergence"] == name
    for command in (["evaluate", "run"], ["resume", "run"]):
        assert main(command) == 0
        assert "divergence: " not in capfd.readouterr().err
    assert l3d.load("run").settings["divergence"] == name
