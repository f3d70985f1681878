"""Where the batch's rows lie is proved, and a model that moves them later is caught."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from l3d.extract import Extractor, extract_gradients
from l3d.layout import AGAIN, DIGITS, PROOFS, Layout

from helpers import assert_relative


class Turncoat(nn.Module):
    """Runs a layer on the rows as they come, or in another order by a product with a permutation matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.order = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), torch.arange(4)

    def forward(self, x: Tensor) -> Tensor:
        forth = torch.eye(4, dtype=x.dtype)[self.order]
        return self.b(forth.T @ torch.tanh(self.a(forth @ x)))


def test_rows_that_move_after_many_batches_are_an_error() -> None:
    """A model that keeps its rows in place until it is trusted, and then does not, is caught at the next proof."""
    model = Turncoat()
    extractor = Extractor(model, "mse", "mean")
    for _ in range(PROOFS):
        extractor(torch.randn(4, 3, dtype=torch.float64))
    model.order = torch.tensor([1, 0, 3, 2])

    def go_on() -> None:
        for _ in range(AGAIN):
            extractor(torch.randn(4, 3, dtype=torch.float64))

    with pytest.raises(ValueError, match="changed places"):
        go_on()


def test_rows_that_move_before_that_are_followed() -> None:
    """A model that moves its rows within the first batches is proved at every batch from then on."""
    model, inputs = Turncoat(), torch.randn(4, 3, dtype=torch.float64)
    extractor = Extractor(model, "mse", "mean")
    for batch in range(3 * AGAIN):
        model.order = torch.arange(4) if batch % 3 else torch.tensor([1, 0, 3, 2])
        actual = extractor(inputs).materialize()["a.weight"]
        assert_relative(actual, extract_gradients(model, inputs, "mse", "mean").materialize()["a.weight"], 1e-12)
        order, model.order = model.order, torch.arange(4)
        straight = extract_gradients(model, inputs, "mse", "mean").materialize()["a.weight"]
        assert_relative(actual, straight, 1e-12)
        model.order = order


@pytest.mark.parametrize("kind", ["major", "minor", "dim1"])
def test_join_undoes_split(kind: str) -> None:
    """Splitting the batch off and joining it again is the identity, and sample b's block is b's."""
    layout = Layout(kind, 3)
    tensor = torch.randn(6, 3, 5)
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
        assert [reference() for reference in seen] == [None] * 6
    finally:
        gc.enable()
