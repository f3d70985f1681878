"""Check the shortcut through a language model's head: where it is taken, and that the gradients are the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3d.gradients import extract
from l3d.gradients.extract import extract_gradients

from extraction import (
    VOCABULARY,
    WIDTH,
    Head,
    assert_gradients,
    kl,
    tokens,
)
from layer_checks import Net, weight

pytestmark = pytest.mark.usefixtures("float64")


def capped(self: Any, h: Tensor) -> Tensor:
    return 3 * torch.tanh(F.linear(h, self.w, self.b) / 3)


def linear_head() -> dict[str, Any]:
    return {"w": weight(VOCABULARY, WIDTH), "b": weight(VOCABULARY)}


TAKEN: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(WIDTH, VOCABULARY, bias=False),
    "bias": lambda: nn.Linear(WIDTH, VOCABULARY),
    "scaled": lambda: Net(lambda self, h: 0.3 * F.linear(h, self.w, self.b), **linear_head()),
    "divided": lambda: Net(lambda self, h: F.linear(h, self.w, self.b) / 7, **linear_head()),
    "scaled by a tensor": lambda: Net(lambda self, h: F.linear(h, self.w) * torch.tensor(0.3), w=weight(9, WIDTH)),
    "vocabulary slice": lambda: Net(lambda self, h: F.linear(h, self.w, self.b)[..., 2:9], **linear_head()),
    "every other word": lambda: Net(lambda self, h: F.linear(h, self.w, self.b)[..., ::2], **linear_head()),
    "soft-capped": lambda: Net(capped, **linear_head()),
    "stored as [in, out]": lambda: Net(lambda self, h: h @ self.w, w=weight(WIDTH, 9)),
    "addmm": lambda: Net(
        lambda self, h: torch.addmm(self.b, h.flatten(0, 1), self.w, alpha=0.5, beta=2).unflatten(0, h.shape[:2]),
        w=weight(WIDTH, 9),
        b=weight(9),
    ),
    "cast": lambda: Net(lambda self, h: F.linear(h, self.w).to(torch.float64, copy=True), w=weight(9, WIDTH)),
}


def rolled(self: Any, h: Tensor) -> Tensor:
    return F.linear(h, self.w).roll(1, 1)


def attending(self: Any, h: Tensor) -> Tensor:
    """The output of an attention over a batch of one, a plain matrix product of two activations."""
    y = torch.softmax(h[0] @ h[0].T, -1) @ F.linear(h[0], self.w)
    return y.view(1, *y.shape)


NOT_TAKEN: dict[str, Callable[[], nn.Module]] = {
    "cumsum over positions": lambda: Net(lambda self, h: F.linear(h, self.w).cumsum(1), w=weight(9, WIDTH)),
    "cumsum over the vocabulary": lambda: Net(lambda self, h: F.linear(h, self.w).cumsum(-1), w=weight(9, WIDTH)),
    "rolled positions": lambda: Net(rolled, w=weight(9, WIDTH)),
    "positions mixed by a constant": lambda: Net(
        lambda self, h: torch.ones(h.shape[1], h.shape[1]).tril() @ F.linear(h, self.w), w=weight(9, WIDTH)
    ),
    "a term that mixes positions": lambda: Net(
        lambda self, h: F.linear(h, self.w) + F.linear(h, self.w.sin()).cumsum(1), w=weight(9, WIDTH)
    ),
    "a bias by itself": lambda: Net(lambda self, h: F.linear(h, self.w) + self.b, **linear_head()),
    "a learned scale": lambda: Net(lambda self, h: self.c * F.linear(h, self.w), w=weight(9, WIDTH), c=weight(1)),
    "a scale per position": lambda: Net(
        lambda self, h: F.linear(h, self.w) * torch.arange(1.0, h.shape[1] + 1)[:, None], w=weight(9, WIDTH)
    ),
    "positions cut off": lambda: Net(lambda self, h: F.linear(h, self.w)[:, 1:], w=weight(9, WIDTH)),
    "rows cut off": lambda: Net(lambda self, h: F.linear(torch.cat([h, h]), self.w)[len(h) :], w=weight(9, WIDTH)),
    "two heads side by side": lambda: Net(
        lambda self, h: torch.cat([F.linear(h, self.w), F.linear(h.sin(), self.w)], -1), w=weight(9, WIDTH)
    ),
    "logits read as another shape": lambda: Net(
        lambda self, h: F.linear(h, self.w).reshape(len(h), -1, 3), w=weight(9, WIDTH)
    ),
    "log-probabilities": lambda: Net(lambda self, h: F.linear(h, self.w).log_softmax(-1), w=weight(9, WIDTH)),
    "weight on the left": lambda: Net(
        lambda self, h: (self.w @ h.flatten(0, 1).T).T.unflatten(0, h.shape[:2]), w=weight(9, WIDTH)
    ),
}
COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "a normalised weight": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, VOCABULARY)),
    "a scaled weight": lambda: Net(lambda self, h: F.linear(h, 2 * self.w), w=weight(9, WIDTH)),
    "a low-rank update": lambda: Net(
        lambda self, h: h @ (self.w + self.a @ self.b), w=weight(WIDTH, 9), a=weight(WIDTH, 2), b=weight(2, 9)
    ),
    "a slice of a weight": lambda: Net(lambda self, h: F.linear(h, self.w[2:]), w=weight(11, WIDTH)),
    "a weight made of activations": lambda: Net(lambda self, h: h @ (self.w * h.sum()), w=weight(WIDTH, 9)),
}


def check_head(head: nn.Module, rows: int, whole_batch: bool = False) -> None:
    """Compare the gradients of a model with this head with plain autograd's, position by position."""
    model, inputs = Head(head), tokens(rows)
    output = model(inputs)
    references = torch.randn_like(output)
    gradients = extract_gradients(model, inputs, "kl", references.detach())
    names, params = zip(*model.named_parameters(), strict=True)
    rows_of: dict[str, list[Tensor]] = {name: [] for name in names}
    for logit, reference in zip(output.flatten(0, 1), references.flatten(0, 1), strict=True):
        for name, grad in zip(names, torch.autograd.grad(kl(logit, reference), params, retain_graph=True), strict=True):
            rows_of[name].append(grad)
    assert_gradients(gradients, {name: torch.stack(grads) for name, grads in rows_of.items()})


@pytest.fixture
def shortcuts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record at every extraction whether the head shortcut was found."""
    found: list[bool] = []
    positionwise_head = extract.positionwise_head

    def spy(*args: Any) -> Any:
        head = positionwise_head(*args)
        found.append(head is not None)
        return head

    monkeypatch.setattr(extract, "positionwise_head", spy)
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", TAKEN)
def test_shortcut_is_taken_and_exact(name: str, rows: int, shortcuts: list[bool]) -> None:
    """Where the output is the head's own result, position by position, backward passes start below the head."""
    check_head(TAKEN[name](), rows)
    assert shortcuts == [True]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NOT_TAKEN)
def test_shortcut_is_not_taken(name: str, rows: int, shortcuts: list[bool]) -> None:
    """Where the output is anything else than the head's own result, plain autograd differentiates it."""
    check_head(NOT_TAKEN[name](), rows)
    assert shortcuts == [False]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", COMPUTED)
def test_heads_with_a_computed_weight(name: str, rows: int) -> None:
    """A head whose weight is itself computed is exact: the parameters behind the weight get their gradients."""
    check_head(COMPUTED[name](), rows)


def test_a_product_of_activations_is_not_a_head() -> None:
    """The last product of an attention, whose right-hand side is an activation too, is differentiated in both."""
    check_head(Net(attending, w=weight(9, WIDTH)), rows=1)


@pytest.mark.parametrize("positions", ["all", 2])
@pytest.mark.parametrize("name", TAKEN)
def test_shortcut_equals_plain_autograd(name: str, positions: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the shortcut the gradients are the same, whichever positions are drawn."""
    model, inputs = Head(TAKEN[name]()), tokens()
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        results.append(extract_gradients(model, inputs, "kl", "sample", None, positions, generator))
        monkeypatch.setattr(extract, "positionwise_head", lambda *args: None)
    assert_gradients(results[0], results[1].materialize())
