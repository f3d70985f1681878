"""Compare l3d.top_logits with finite differences: derivatives of probabilities along a subnetwork at δ = 0."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import l3d
from l3d.analysis.logits import METHODS, Movement, TopLogits, move, move_many
from l3d.api import Decomposition

from helpers import assert_relative
from small_models import Classifier, OneWay, Tiny


class Looking(nn.Linear):
    """A model whose control flow looks at values, so that it cannot be batched."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if float(x.sum()) > 0 else y


CASES = {
    "language model": (Tiny, lambda: torch.randint(11, (3, 7))),
    "keywords": (Tiny, lambda: {"input_ids": torch.randint(11, (3, 7))}),
    "classifier": (Classifier, lambda: torch.randn(4, 3, 5, 5)),
}


def made(kind: type[nn.Module], n: int = 3) -> tuple[nn.Module, Decomposition]:
    """Return a model and random unit directions in all of its parameters."""
    model = kind().eval()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    d = Decomposition(shapes, n, rank=2, generator=torch.Generator().manual_seed(1)).double()
    d.normalize_()
    return model, d


def probabilities(model: nn.Module, x: Any) -> Tensor:
    out = model(**x) if isinstance(x, dict) else model(x)
    return (out["logits"] if isinstance(out, dict) else out).softmax(-1).detach()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_of_finite_differences(case: str, method: str) -> None:
    """Central differences of the model with its weights moved, at two steps so that their own error is known."""
    kind, draw = CASES[case]
    model, d = made(kind)
    x = draw()
    n = probabilities(model, x).shape[-1]
    found = l3d.top_logits(model, d, 1, x, n=n, method=method)
    dense = torch.empty_like(found.raised_by).scatter_(-1, found.raised, found.raised_by)
    differences = []
    for step in (1e-3, 5e-4):
        sides = []
        for sign in (1, -1):
            with l3d.intervene(model, d, {1: sign * step}):
                sides.append(probabilities(model, x))
        differences.append((sides[0] - sides[1]) / (2 * step))
    # Richardson: the error of the second order cancels
    assert_relative(dense, (4 * differences[1] - differences[0]) / 3, 1e-9)
    assert torch.equal(found.lowered_by, found.raised_by.flip(-1))
    assert torch.equal(found.lowered, found.raised.flip(-1))


@pytest.mark.usefixtures("float64")
def test_a_language_model_has_logits_at_every_position() -> None:
    model, d = made(Tiny)
    found = l3d.top_logits(model, d, 0, torch.randint(11, (2, 5)), n=4)
    assert {tuple(part.shape) for part in found} == {(2, 5, 4)}
    assert (found.raised_by.diff(dim=-1) <= 0).all()
    assert (found.lowered_by.diff(dim=-1) >= 0).all()


@pytest.mark.usefixtures("float64")
def test_an_operation_without_forward_mode_is_named_and_has_another_way() -> None:
    """The error says what to do, and the double backward is the exact derivative: 2 x (V x) through the square."""
    model, d = made(OneWay)
    x = torch.randn(6, 4)
    with pytest.raises(RuntimeError, match="no forward-mode derivative; pass method='double_backward'"):
        l3d.top_logits(model, d, 0, x, n=3)
    v = d.subnetwork(0)
    before = F.linear(x, model.first.weight, model.first.bias)
    moved = 2 * before * F.linear(x, v["first.weight"], v["first.bias"])
    expected = F.linear(moved, model.second.weight) + F.linear(before**2, v["second.weight"], v["second.bias"])
    assert_relative(move(model, v, x, "double_backward").derivative, expected, 1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind, inputs", [(Classifier, (3, 5, 5)), (lambda: Looking(4, 3), (4,))])
def test_many_directions_at_once_are_each_by_itself(kind: Any, inputs: tuple[int, ...]) -> None:
    """Also for a model that cannot be batched over directions."""
    model, d = made(kind)
    x = torch.randn(3, 2, *inputs)
    parts = [d.subnetwork(i) for i in range(3)]
    many = move_many(model, {name: torch.stack([part[name] for part in parts]) for name in parts[0]}, x)
    for i, part in enumerate(parts):
        alone = move(model, part, x[i])
        assert_relative(many.output[i], alone.output, 1e-12)
        assert_relative(many.derivative[i], alone.derivative, 1e-12)


@pytest.mark.usefixtures("float64")
def test_the_model_is_left_as_it_was() -> None:
    model, d = made(Classifier)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    l3d.top_logits(model, d, 0, torch.randn(2, 3, 5, 5), n=1)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("float64")
def test_bad_arguments_are_refused() -> None:
    model, d = made(Classifier)
    x = torch.randn(2, 3, 5, 5)
    with pytest.raises(ValueError, match="n: expected between 1 and the output's 4 entries, got 5"):
        l3d.top_logits(model, d, 0, x, n=5)
    with pytest.raises(ValueError, match="index: expected 0 <= index < 3, got 3"):
        l3d.top_logits(model, d, 3, x)
    with pytest.raises(ValueError, match="method: expected one of forward, double_backward, got 'reverse'"):
        l3d.top_logits(model, d, 0, x, n=1, method="reverse")
    with pytest.raises(ValueError, match=r"model: has no parameter 'conv\.weight'"):
        l3d.top_logits(nn.Linear(3, 4), d, 0, x, n=1)
    with pytest.raises(ValueError, match="is in training mode"):
        l3d.top_logits(model.train(), d, 0, x, n=1)


def test_results_are_shown_in_one_line() -> None:
    """Sizes and the extreme derivatives, never the arrays."""
    entries, values = torch.zeros(4, 7, 2, dtype=torch.int64), torch.linspace(0, 0.5, 56).view(4, 7, 2)
    assert repr(TopLogits(entries, values, entries, -values / 2)) == (
        "TopLogits(samples [4, 7], 2 entries raised and lowered; derivatives from -0.25 to 0.5)"
    )
    assert repr(Movement(torch.ones(4, 3), -2 * torch.ones(4, 3))) == "Movement(output [4, 3]; largest |derivative| 2)"
