"""The mean row of a head under its softmax, against the whole softmax in float64; what is refused."""

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels import splitting

from helpers import assert_relative


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(3, 11, 4), (1, 1, 1), (0, 5, 2), (5, 2, 7)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_it_is_the_mean_row_under_the_softmax(
    sizes: tuple[int, int, int], biased: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the pieces, the value is softmax(hidden weightᵀ + bias) weight."""
    monkeypatch.setattr(splitting, "CHUNK", chunk)
    S, V, D = sizes
    hidden, weight = draw(S, D, seed=1), draw(V, D, seed=2)
    bias = draw(V, seed=3) if biased else None
    logits = hidden @ weight.mT + (0 if bias is None else bias)
    assert_relative(lk.softmax_mean(hidden, weight, bias), logits.softmax(1) @ weight, 1e-12)


def test_it_is_the_gradient_of_a_divergence() -> None:
    """The gradient of KL(softmax(r) ‖ softmax(logits)) at the head's input is μ less the reference's μ."""
    hidden, other, weight = draw(4, 6).requires_grad_(), draw(4, 6, seed=1), draw(9, 6, seed=2)
    log_p, log_q = (other @ weight.mT).log_softmax(1), (hidden @ weight.mT).log_softmax(1)
    (expected,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), hidden)
    assert_relative(lk.softmax_mean(hidden.detach(), weight) - lk.softmax_mean(other, weight), expected, 1e-12)


def test_large_logits_do_not_overflow() -> None:
    """Logits far beyond the exponential's range give the row of the largest."""
    weight = draw(9, 6)
    assert_relative(lk.softmax_mean(1e5 * weight, weight), weight[(weight @ weight.mT).argmax(1)], 1e-12)


@pytest.mark.parametrize("chunk", [1, 16, 1 << 22])
@pytest.mark.parametrize("masked", [slice(0, 6), slice(3, 9), slice(5, 11)])
def test_a_masked_vocabulary_weighs_nothing(masked: slice, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of bias -inf count as if they were not there, also where a whole piece is masked, the first one included."""
    monkeypatch.setattr(splitting, "CHUNK", chunk)
    hidden, weight, bias = draw(3, 4, seed=1), draw(11, 4, seed=2), draw(11, seed=3)
    bias[masked] = -torch.inf
    left = bias.isfinite()
    expected = (hidden @ weight[left].mT + bias[left]).softmax(1) @ weight[left]
    assert_relative(lk.softmax_mean(hidden, weight, bias), expected, 1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((draw(3), draw(4, 3)), r"hidden: expected shape \[S, D\], got \[3\]"),
        ((draw(2, 3), draw(4, 5)), r"weight: expected shape \[V, 3\] with V at least 1, got \[4, 5\]"),
        ((draw(2, 3), draw(0, 3)), r"weight: expected shape \[V, 3\] with V at least 1, got \[0, 3\]"),
        ((draw(2, 3), draw(4, 3), draw(3)), r"bias: expected shape \[4\], got \[3\]"),
        ((draw(2, 3).requires_grad_(), draw(4, 3)), "hidden: softmax_mean is not differentiable; detach it"),
    ],
)
def test_what_does_not_belong_together_is_refused(arguments: tuple[Tensor, ...], message: str) -> None:
    """One line: the argument, the expected shape, the one it got."""
    with pytest.raises(ValueError, match=message):
        lk.softmax_mean(*arguments)
