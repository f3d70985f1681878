"""Prove where the batch's rows lie in a tensor, and catch a model that moves them later."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from l3d.gradients.extract import Extractor, extract_gradients
from l3d.gradients.graph.layout import DIGITS, Layout

from helpers import assert_relative


class Turncoat(nn.Module):
    """Runs a layer on the rows as they come, or in another order by a product with a permutation matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.order = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), torch.arange(4)

    def forward(self, x: Tensor) -> Tensor:
        forth = torch.eye(4, dtype=x.dtype)[self.order]
        return self.b(forth.T @ torch.tanh(self.a(forth @ x)))


def test_rows_that_move_from_one_batch_to_the_next_are_followed() -> None:
    """However long a model kept its rows in place, the batch in which it does not is proved like every other."""
    model, inputs = Turncoat(), torch.randn(4, 3, dtype=torch.float64)
    extractor = Extractor(model, "mse", "mean")
    straight = extract_gradients(model, inputs, "mse", "mean").materialize()["a.weight"]
    for batch in range(20):
        model.order = torch.tensor([1, 0, 3, 2]) if batch == 19 else torch.arange(4)
        assert_relative(extractor(inputs).materialize()["a.weight"], straight, 1e-12)


@pytest.mark.parametrize("kind, per_block", [("major", 1), ("minor", 1), ("dim1", 1), ("dim1", 4)])
def test_join_undoes_split(kind: str, per_block: int) -> None:
    """Splitting the batch off and joining it again is the identity, and sample b's block is b's."""
    layout = Layout(kind, 3, per_block=per_block)
    tensor = torch.randn(6, 3 * per_block, 5)
    assert layout.fits(tensor.shape)
    if kind == "dim1":
        assert torch.equal(
            layout.split(tensor)[1].flatten().sort()[0], tensor[:, per_block : 2 * per_block].flatten().sort()[0]
        )
    assert torch.equal(layout.join(layout.split(tensor)), tensor)
    assert layout.split(tensor).shape[0] == 3


def test_more_rows_than_a_digit_holds() -> None:
    """Rows beyond one digit's reach are told apart too: a swap of two whose first digits agree is seen."""
    n_rows = 2 * DIGITS

    class Swap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).roll(DIGITS, 0)

    model, inputs = Swap(), torch.randn(n_rows, 3, dtype=torch.float64)
    actual = extract_gradients(model, inputs, "mse", torch.zeros(n_rows, 2)).materialize()["a.weight"]
    plain = nn.Sequential(model.a)
    straight = extract_gradients(plain, inputs, "mse", torch.zeros(n_rows, 2)).materialize()["0.weight"]
    assert_relative(actual, straight.roll(DIGITS, 0), 1e-12)


def test_the_graph_is_freed_without_the_garbage_collector() -> None:
    """Nothing that an extraction leaves behind keeps the graph alive in a reference cycle."""
    seen: list[weakref.ref] = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            seen.append(weakref.ref(output))
            return output.tanh()

    extractor = Extractor(nn.Sequential(Spy(3, 3), Spy(3, 2)), "mse", "mean")
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            extractor(torch.randn(4, 3))
        assert [reference() for reference in seen] == [None] * 8  # the first batch is run once more, without a graph
    finally:
        gc.enable()
