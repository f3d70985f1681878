"""Index a decomposition's subnetworks, read their factors, and show it in a terminal and a notebook."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import l3d
from l3d.api import Decomposition

from helpers import assert_relative

SHAPES = {
    "matrix.weight": torch.Size([6, 4]),
    "matrix.bias": torch.Size([6]),
    "conv.weight": torch.Size([5, 4, 3, 2]),
    "scale": torch.Size([]),
}
RANKS = {"matrix.*": 3, "conv.*": (2, 3, 1, 2), "*": 1}
K = 7


@pytest.fixture
def d(float64: None) -> Decomposition:
    """Seven subnetworks, of unit norm, that have not been trained."""
    made = Decomposition(SHAPES, K, RANKS, {"k": 0.25}, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for parameter in made.decoder.parameters():  # or the decoder would be the encoder
            parameter.add_(torch.randn_like(parameter))
    made.normalize_()
    return made


# --- by index ---------------------------------------------------------------------------------------------------


def test_a_decomposition_is_a_sequence_of_its_subnetworks(d: Decomposition) -> None:
    """len is K; d[i] is subnetwork(i), the decoder's direction in each tensor's shape; a loop ends after the last."""
    assert len(d) == d.n_subnetworks == K
    for i in range(K):
        assert {name: tensor.shape for name, tensor in d[i].items()} == SHAPES
        assert all(torch.equal(d[i][name], tensor) for name, tensor in d.subnetwork(i).items())
        assert all(torch.equal(d[i][name], tensor) for name, tensor in d.decoder.tensors(i).items())
        assert_relative(sum(tensor.square().sum() for tensor in d[i].values()), 1.0, 1e-12)
    assert len(list(d)) == K


@pytest.mark.parametrize("index", [-1, -3, -K])
def test_negative_indices_count_from_the_end(index: int, d: Decomposition) -> None:
    for read in (d.__getitem__, d.subnetwork):
        assert all(torch.equal(read(index)[name], tensor) for name, tensor in d[K + index].items())
    for name, sides in d.factors(index).items():
        assert all(torch.equal(a, b) for a, b in zip(sides, d.factors(K + index)[name], strict=True))


@pytest.mark.parametrize("index", [K, K + 5, -K - 1])
def test_an_index_out_of_range_is_an_index_error(index: int, d: Decomposition) -> None:
    for read in (d.__getitem__, d.subnetwork, d.factors):
        with pytest.raises(IndexError, match=rf"^index: expected -7 <= index < 7, got {index}$"):
            read(index)


# --- factors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 4, -1])
def test_factors_multiply_to_the_subnetwork(index: int, d: Decomposition) -> None:
    """Σ_r left_r ⊗ right_r is the tensor, for a matrix and, as [first mode, the others], for a Tucker product."""
    factors, subnetwork = d.factors(index), d.subnetwork(index)
    assert list(factors) == ["matrix.weight", "conv.weight"]  # vectors and scalars have none
    shapes = {name: (tuple(left.shape), tuple(right.shape)) for name, (left, right) in factors.items()}
    assert shapes == {"matrix.weight": ((3, 6), (3, 4)), "conv.weight": ((2, 5), (2, 24))}
    for name, (left, right) in factors.items():
        product = torch.einsum("ro,ri->oi", left, right)
        assert_relative(product.reshape(SHAPES[name]), subnetwork[name], 1e-12)
        assert torch.linalg.matrix_rank(product) == len(left)


def test_factors_are_copies(d: Decomposition) -> None:
    """Changing them changes no subnetwork, and autograd does not know them."""
    before = {name: tensor.clone() for name, tensor in d[2].items()}
    for left, right in d.factors(2).values():
        assert not left.requires_grad
        assert not right.requires_grad
        left.zero_()
        right.zero_()
    assert all(torch.equal(d[2][name], tensor) for name, tensor in before.items())


# --- shown ------------------------------------------------------------------------------------------------------

LINES = [
    "  matrix.weight [6, 4]: rank 3",
    "  matrix.bias [6]: whole",
    "  conv.weight [5, 4, 3, 2]: rank 2×3×1×2",
    "  scale []: whole",
]


def test_repr_before_training(d: Decomposition) -> None:
    """K, k and the number of tensors; then a line for each tensor."""
    assert repr(d).splitlines() == ["Decomposition(K=7, k=0.25, 4 tensors)", *LINES]
    alone = Decomposition({"weight": torch.Size([3, 2])}, 1, 1)
    assert repr(alone) == "Decomposition(K=1, 1 tensor)\n  weight [3, 2]: rank 1"


def test_repr_after_training() -> None:
    """The last error and the steps too, and no page of numbers, whatever K is."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    trained = l3d.decompose(model, torch.randn(40, 4), 50, rank=2, k=0.3, steps=8, callbacks=[])
    first, *others = repr(trained).splitlines()
    error = trained.history["error"][-1]
    assert first == f"Decomposition(K=50, k=0.3, 4 tensors, error {error:.3f} after 8 steps)"
    shapes = {
        "0.weight": "[6, 4]: rank 2",
        "0.bias": "[6]: whole",
        "2.weight": "[3, 6]: rank 2",
        "2.bias": "[3]: whole",
    }
    assert others == [f"  {name} {text}" for name, text in shapes.items()]
    assert str(trained) == repr(trained)


def test_repr_of_restarts_side_by_side_has_no_error(d: Decomposition) -> None:
    """Their history holds a list at each step, as a checkpoint does."""
    d.history = {"step": [1, 2], "error": [[0.5, 0.25], [0.125, 0.0625]]}  # type: ignore[dict-item]
    assert repr(d).splitlines()[0] == "Decomposition(K=7, k=0.25, 4 tensors)"
    assert "<svg" not in d._repr_html_()


def test_html_holds_the_text_and_escapes_names() -> None:
    """A parameter may be called anything; nothing is drawn before training."""
    name = "<script>&'\".weight"
    text = Decomposition({name: torch.Size([3, 2])}, 2, 1)._repr_html_()
    assert "&lt;script&gt;&amp;&#x27;&quot;.weight [3, 2]: rank 1" in text
    assert "<script" not in text
    assert "<svg" not in text
    assert re.sub(r"</?(div|br)>", "", text).count("<") == 0


@pytest.mark.parametrize(
    "errors, curve",
    [
        ([0.8, 0.4, 0.2], "0.0,0.0 150.0,40.0 300.0,60.0"),
        ([0.5, 1.0], "0.0,40.0 300.0,0.0"),
        ([0.0, 0.0], "0.0,80.0 300.0,80.0"),
    ],
    ids=str,
)
def test_html_has_the_curve_once_trained(errors: list[float], curve: str, d: Decomposition) -> None:
    """One point for each record from left to right, the largest error at the top; the ends are said in words."""
    d.history = {"step": list(range(1, len(errors) + 1)), "error": errors}
    text: Any = d._repr_html_()
    assert f'<polyline points="{curve}"' in text
    assert f"from {errors[0]:.3f} to {errors[-1]:.3f}" in text
    assert f"error {errors[-1]:.3f} after {len(errors)} steps" in text


def test_html_of_a_single_record_has_no_curve(d: Decomposition) -> None:
    d.history = {"step": [1.0], "error": [0.5]}
    assert "<svg" not in d._repr_html_()
