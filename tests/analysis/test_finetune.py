"""Fine-tune along subnetworks: a planted move is found, nothing else is trained, the model is restored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import l3d
from l3d.analysis.finetune import FineTuned
from l3d.api import Decomposition

from helpers import assert_relative


def setup(K: int = 4) -> tuple[nn.Sequential, Decomposition, Tensor]:
    """A float64 network, random subnetworks of three of its four tensors, and inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    shapes = {name: p.shape for name, p in model.named_parameters() if name != "2.bias"}
    d = Decomposition(shapes, K, 2, generator=torch.Generator().manual_seed(1)).double()
    return model, d, torch.randn(64, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def planted(model: nn.Module, d: Decomposition, x: Tensor, deltas: dict[int, float]) -> TensorDataset:
    """The inputs with the outputs of the network moved by deltas."""
    with l3d.intervene(model, d, deltas), torch.no_grad():
        return TensorDataset(x, model(x))


def test_a_planted_move_is_recovered() -> None:
    """Trained on the outputs of a moved network, the δ come out as they were planted, to 1e-3, and the rest at 0."""
    model, d, x = setup()
    data = planted(model, d, x, {1: 0.7, 3: -0.4})
    tuned = l3d.finetune(model, d, data, F.mse_loss, subnetworks=[3, 0, 1], steps=600, batch_size=64)
    assert list(tuned.deltas) == [3, 0, 1]
    for index, wanted in ((3, -0.4), (0, 0.0), (1, 0.7)):
        assert tuned.deltas[index] == pytest.approx(wanted, abs=1e-3)
    assert tuned.losses[-1] < 1e-6 * tuned.losses[0]
    assert len(tuned.losses) == 600


def test_merged_weights_are_those_of_the_intervention(tmp_path: Path) -> None:
    """state_dict() and the file hold W0 + Σ δ V, by `subnetwork`, and load into another copy of the model."""
    model, d, x = setup()
    before = bits(model)
    tuned = l3d.finetune(model, d, planted(model, d, x, {0: 0.5}), F.mse_loss, [0, 2], steps=20)
    expected = dict(before)
    for index, delta in tuned.deltas.items():
        for name, v in d.subnetwork(index).items():
            expected[name] = expected[name] + delta * v
    merged = load_file(tuned.save(tmp_path / "new" / "merged.safetensors"))
    assert list(tuned.state_dict()) == list(before)
    for name, value in tuned.state_dict().items():
        assert_relative(value, expected[name], 1e-12)
        assert torch.equal(merged[name], value)
    assert torch.equal(merged["2.bias"], before["2.bias"])
    other, _, _ = setup()
    other.load_state_dict(merged)
    with l3d.intervene(model, d, tuned.deltas):
        assert_relative(other(x), model(x), 1e-12)
    assert same(model, before)


def test_nothing_but_the_deltas_is_touched() -> None:
    """Weights, flags, gradients, the decomposition and the random state are as before."""
    model, d, x = setup()
    model[0].weight.requires_grad_(False)
    data = planted(model, d, x, {0: 0.5})
    before, directions, state = bits(model), bits(d), torch.get_rng_state()
    l3d.finetune(model, d, data, F.mse_loss, [0], steps=5)
    assert same(model, before)
    assert same(d, directions)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in (*model.parameters(), *d.parameters()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_restored_after_an_exception(error: type[BaseException]) -> None:
    """A loss that raises in the middle passes through and leaves weights and flags."""
    model, d, x = setup()
    before, calls = bits(model), []

    def failing(output: Tensor, target: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == 3:
            raise error
        return F.mse_loss(output, target)

    with pytest.raises(error):
        l3d.finetune(model, d, planted(model, d, x, {0: 0.5}), failing, [0])
    assert same(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_single_input_is_its_own_target_and_tied_weights_stay_tied() -> None:
    """A language model's loss takes (logits, tokens); a tied table is moved once, in both of its roles."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Any:
            return {"logits": self.head(self.embedding(tokens))}

    torch.manual_seed(0)
    model = Tied().eval()
    d = Decomposition({"embedding.weight": model.embedding.weight.shape}, 3, 2)
    tokens = torch.randint(7, (20, 5))

    def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    tuned = l3d.finetune(model, d, tokens, next_token, [0, 1, 2], steps=60, batch_size=20)
    assert tuned.losses[-1] < tuned.losses[0] - 1e-3
    merged = tuned.state_dict()
    assert torch.equal(merged["embedding.weight"], merged["head.weight"])
    model.load_state_dict(merged)
    assert next_token(model(tokens)["logits"], tokens).item() == pytest.approx(tuned.losses[-1], abs=1e-4)


def test_the_same_seed_gives_the_same_deltas() -> None:
    """Batches depend on the seed alone."""
    model, d, x = setup()
    data = planted(model, d, x, {0: 0.5})
    runs = [l3d.finetune(model, d, data, F.mse_loss, [0, 1], steps=10, seed=seed).deltas for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"subnetworks": []}, r"subnetworks: expected different ones of 4, got \[\]"),
        ({"subnetworks": [1, 1]}, r"subnetworks: expected different ones of 4, got \[1, 1\]"),
        ({"subnetworks": [4]}, r"subnetworks: expected different ones of 4, got \[4\]"),
        ({"steps": 0}, "steps: expected a positive whole number, got 0"),
        ({"lr": -1.0}, "lr: expected a positive number, got -1.0"),
        ({"batch_size": 0}, "batch_size: expected a positive whole number, got 0"),
        ({"loss": lambda y, t: (y - t).square()}, r"loss: expected one finite number, got \[16, 3\]; step 0"),
        ({"loss": lambda y, t: y.sum() * float("nan")}, "loss: expected one finite number, got"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    """A mistake raises ValueError that names the argument, and the model stays."""
    model, d, x = setup()
    before = bits(model)
    chosen = {"loss": F.mse_loss, "subnetworks": [0]} | arguments
    with pytest.raises(ValueError, match=message):
        l3d.finetune(model, d, TensorDataset(x, x[:, :3]), **chosen)
    assert same(model, before)


def test_another_model_is_refused() -> None:
    """A model with other shapes is named before anything is trained."""
    _, d, x = setup()
    with pytest.raises(ValueError, match="model: has no parameter"):
        l3d.finetune(nn.Linear(5, 3), d, TensorDataset(x, x), F.mse_loss, [0])


def test_a_result_is_shown_in_one_line() -> None:
    """Numbers of subnetworks and steps, losses and the largest δ, never the lists or the model."""
    model, d, _ = setup()
    tuned = FineTuned({3: 0.25, 1: -0.5}, [4.0, 2.0, 1.0], model, d)
    assert repr(tuned) == "FineTuned(2 subnetworks, 3 steps; loss 4 -> 1; largest |δ| 0.5)"
    assert repr(FineTuned({}, [], model, d)) == "FineTuned(0 subnetworks, 0 steps; no loss; largest |δ| 0)"
