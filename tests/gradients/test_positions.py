"""Find the last operation that mixes positions; above it one backward pass serves all positions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from l3d.gradients.extract import extract_gradients
from l3d.gradients.graph.positions import last_apart, positionwise_head

from helpers import assert_relative

ROWS, WIDTH, N_TOKENS = 4, 4, 5  # as many rows as positions: a transposition does not show in the shape
TOKENS = torch.randint(N_TOKENS, (ROWS, ROWS), generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """A first layer, something between, and a residual MLP under a head, position by position."""

    def __init__(self, between: Callable[[Tensor], Tensor], above: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(N_TOKENS, WIDTH)
        self.first, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down, self.head = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, N_TOKENS)
        self.norm = nn.LayerNorm(WIDTH)
        self.between, self.above = between, above
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [rows, positions, tokens], and remember what the MLP starts from."""
        self.mixed = self.between(self.first(self.table(tokens)))
        hidden = self.mixed + self.down(self.above(self.up(self.norm(self.mixed))))
        return self.head(hidden)


def walked(model: Mixed) -> tuple[Tensor, torch.autograd.graph.Node]:
    """Run a model of which the first layer alone is trainable; return the output and where positions are apart last."""
    for p in model.parameters():
        p.requires_grad_(False)
    chosen = {"first.weight": model.first.weight.requires_grad_()}
    output = model(TOKENS)
    found = positionwise_head(output, chosen)
    assert found is not None
    assert found[1] is not None
    return output, last_apart(found[1], *TOKENS.shape).node


def true_gradients(model: Mixed, references: Tensor) -> Tensor:
    """One backward pass per row and position."""
    log_q = model(TOKENS).log_softmax(-1).flatten(0, 1)
    log_p = references.flatten(0, 1).log_softmax(-1)
    divergences = (log_p.exp() * (log_p - log_q)).sum(1)
    grads = [torch.autograd.grad(each, model.first.weight, retain_graph=True)[0] for each in divergences]
    return torch.stack(grads)


def split_softmax(x: Tensor) -> Tensor:
    gate, rest = x.chunk(2, dim=-1)
    return torch.cat([gate.softmax(-1) * rest, rest.log_softmax(-1)], -1)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "mean over positions": lambda h: h + h.mean(1, keepdim=True),
    "running sum": lambda h: h.cumsum(1),
    "reversed": lambda h: h.flip(1),
    "rolled": lambda h: h.roll(1, 1),
    "softmax over positions": lambda h: h.softmax(1),
    "softmax over rows": lambda h: h.softmax(0),
    "the largest position": lambda h: h * h.amax(1, keepdim=True),
    "transposed": lambda h: h.transpose(0, 1).contiguous(),
    "norm over all of a row": lambda h: nn.functional.layer_norm(h, h.shape[1:]),
    "another view": lambda h: h.reshape(h.shape[0], -1).softmax(1).view_as(h),
    "product of positions": lambda h: torch.bmm(torch.bmm(h, h.mT), h),
    "joined along positions": lambda h: torch.cat([h[:, 1:], h[:, :1]], 1),
    "broadcast over positions": lambda h: h * h[:, :1],
    "sorted": lambda h: h.sort(1).values,
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_positions_ends_the_walk(name: str) -> None:
    """The walk ends above it, at the residual stream that MLP and sum share; the gradients are the true ones."""
    model = Mixed(MIXING[name])
    _, node = walked(model)
    mixed = model.mixed.grad_fn
    assert mixed is not None
    assert node is (mixed.next_functions[0][0] if mixed.name().startswith("Clone") else mixed)
    references = torch.randn(*TOKENS.shape, N_TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = extract_gradients(model, TOKENS, "kl", references, params="first.weight")
    assert_relative(gradients.materialize()["first.weight"], true_gradients(model, references), 1e-10)


@pytest.mark.parametrize(
    "above", [torch.tanh, nn.functional.gelu, nn.functional.silu, split_softmax], ids=lambda f: f.__name__
)
def test_what_keeps_positions_apart_is_walked_through(above: Callable[[Tensor], Tensor]) -> None:
    """With nothing that mixes, the walk ends at the product that uses the chosen weight."""
    model = Mixed(lambda h: (h * h.square().mean(-1, keepdim=True).add(1).rsqrt()).to(torch.float64), above)
    _, node = walked(model)
    assert node.name().startswith("Addmm")
    assert any(below is not None and below.name().startswith("T") for below, _ in node.next_functions)


def test_a_parameter_on_the_way_ends_the_walk() -> None:
    """A norm's scale needs every position's own gradient: nothing below it is left behind."""
    model = Mixed(torch.tanh)
    for p in model.parameters():
        p.requires_grad_(False)
    chosen = {"norm.weight": model.norm.weight.requires_grad_(), "first.weight": model.first.weight.requires_grad_()}
    output = model(TOKENS)
    found = positionwise_head(output, chosen)
    assert found is not None
    assert found[1] is not None
    node = last_apart(found[1], *TOKENS.shape).node
    assert node is not model.mixed.grad_fn
    assert node.name().startswith(("View", "Add"))  # of the residual sum


COLUMNS: dict[str, Callable[[Tensor, Tensor, nn.Linear], Tensor]] = {
    "a product": lambda h, w, layer: h @ w,
    "a product with a transposed weight": lambda h, w, layer: nn.functional.linear(h, w),
    "a product with a bias": lambda h, w, layer: layer(h),
    "a product under a residual": lambda h, w, layer: h + torch.tanh(h @ w),
    "two products": lambda h, w, layer: layer(torch.tanh(h @ w)),
}


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 1])
@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_become_positions_are_mixed_by_a_product(name: str, rows: int) -> None:
    """[rows, positions] @ [positions, positions] mixes positions, though its shape is [rows, positions]."""

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(1, N_TOKENS)
            self.register_buffer("w", torch.randn(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(COLUMNS[name](self.first(x), self.w, self.layer).view(-1, WIDTH, 1))

    torch.manual_seed(0)
    model, x = Columns().double(), torch.randn(rows, WIDTH, dtype=torch.float64)
    gradients = extract_gradients(model, x, "kl", "uniform", "first.weight").materialize()["first.weight"]
    each = -model(x).log_softmax(-1).mean(-1).flatten()  # up to a constant, KL from equal logits
    expected = torch.stack([torch.autograd.grad(one, model.first.weight, retain_graph=True)[0] for one in each])
    assert_relative(gradients, expected, 1e-10)
