"""Check that extraction leaves the model and the random generators as they were, after success and failure."""

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3d.gradients.extract import extract_gradients

from extraction import (
    assert_same,
    gpt2,
    mlp,
    tokens,
)
from layer_checks import Net, weight

pytestmark = pytest.mark.usefixtures("float64")


class Remembering(nn.Module):
    """A model with a bit of everything that an extraction could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.b = nn.Linear(6, 3)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.a(x))) + self.frozen(x)
        if self.fails:
            raise KeyError("the model's own error")
        return self.b(F.relu(h, inplace=True))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and the random generators that must not change."""
    return {
        "tensors": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "addresses": [t.data_ptr() for t in (*model.parameters(), *model.buffers())],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [[len(getattr(module, name)) for name in HOOKS] for module in model.modules()],
        "parameter hooks": [p._backward_hooks for p in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@pytest.mark.parametrize("outcome", ["success", "failure in forward", "refusal"])
@pytest.mark.parametrize("params", [None, "a.*", ["frozen.weight", "b.bias"]], ids=str)
def test_the_model_comes_back_as_it_was(params: Any, outcome: str) -> None:
    """Flags, gradients, hooks, modes, parameters, buffers and generators are the same after any outcome."""
    model = Remembering().eval()
    model.norm.train(False)
    model.b.weight.grad = torch.randn(3, 6)
    model.a.register_forward_hook(lambda module, args, output: None)
    model.a.weight.register_hook(lambda grad: grad)
    inputs = torch.randn(4, 6)
    before = state_of(model)
    if outcome == "success":
        generator = torch.Generator().manual_seed(0)
        extract_gradients(model, inputs, "mse", "sample", params, generator=generator).materialize()
    elif outcome == "refusal":
        with pytest.raises(ValueError, match="reference"):
            extract_gradients(model, inputs, "mse", torch.zeros(7), params)
    else:
        model.fails = True
        with pytest.raises(KeyError, match="own error"):
            extract_gradients(model, inputs, "mse", "mean", params)
        model.fails = False
    assert_same(state_of(model), before)


def test_generators_come_back_when_the_model_draws_and_fails() -> None:
    """A model that draws random numbers and then fails leaves the generator where it was."""

    def forward(self: Any, x: Tensor) -> Tensor:
        torch.rand(3)
        raise KeyError("the model's own error")

    model, inputs = Net(forward, w=weight(2)), torch.randn(4, 6)
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        extract_gradients(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_language_model_comes_back_as_it_was() -> None:
    """The same for a tied language model with drawn positions and references."""
    model, inputs = gpt2(tied=True), tokens()
    before = state_of(model)
    extract_gradients(model, inputs, "kl", "sample", "*attn*", 2, torch.Generator().manual_seed(0)).squared_norm()
    assert_same(state_of(model), before)


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_hold_no_graph(rows: int) -> None:
    """No extracted tensor requires a gradient, so none keeps the model's graph alive."""
    model = mlp()
    gradients = extract_gradients(model, torch.randn(rows, 6), "mse", model(torch.randn(rows, 6)))
    assert [tensor.requires_grad for _, tensor in gradients.tensors()] == [False] * len(list(gradients.tensors()))
