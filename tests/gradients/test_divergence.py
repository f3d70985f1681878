"""Compare divergences and their gradients with autograd and closed forms; check each kind of reference."""

import itertools
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from l3d.gradients import divergence as div
from l3d.gradients.samples import Samples

from helpers import assert_relative, randn

TOLERANCE = 1e-12
S = 6
SHAPES = [(7,), (3, 7), (2, 3, 7)]


def references(
    reference: str | Tensor,
    outputs: Tensor,
    is_kl: bool = False,
    seed: int = 0,
    contrast: Tensor | None = None,
    positions: int | None = None,
) -> Tensor:
    """The references of outputs [S, ...], where every row of data is a sample, or has `positions` of them."""
    whole = outputs if positions is None else outputs.unflatten(0, (-1, positions))
    samples = Samples(whole, None if positions is None else "all", is_kl, None)
    generator = torch.Generator().manual_seed(seed)
    return div.reference_outputs(reference, outputs, contrast, is_kl, generator, samples)


# --- values and gradients ---------------------------------------------------------------------------------------

VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda f, y: F.mse_loss(f, y),
    "mse_published": lambda f, y: (f * f - f * y).mean(),
    "kl": lambda f, y: F.kl_div(f.log_softmax(-1), y.softmax(-1), reduction="sum"),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_values(name: str, shape: tuple[int, ...]) -> None:
    """Each divergence is torch's own loss, sample by sample, whatever the shape of one sample's output."""
    outputs, targets = randn(S, *shape), randn(S, *shape, seed=1)
    expected = [VALUES[name](f, y) for f, y in zip(outputs, targets, strict=True)]
    assert_relative(div.BY_NAME[name](outputs, targets), torch.stack(expected), TOLERANCE)


@pytest.mark.parametrize(
    "name, shape", [*itertools.product(VALUES, SHAPES), ("mse", ()), ("mse_published", ())], ids=str
)
def test_gradients_are_autograds(name: str, shape: tuple[int, ...]) -> None:
    """The gradients written out are those of the values, and the same as for a callable that is not recognised."""
    outputs, targets = randn(S, *shape), randn(S, *shape, seed=1)
    divergence = div.BY_NAME[name]
    actual = div.output_gradient(divergence, outputs, targets)
    leaf = outputs.clone().requires_grad_()
    total = sum(VALUES[name](f, y) for f, y in zip(leaf, targets, strict=True))
    (expected,) = torch.autograd.grad(total, leaf)
    assert_relative(actual, expected, TOLERANCE)
    assert_relative(div.output_gradient(lambda f, y: divergence(f, y), outputs, targets), expected, TOLERANCE)


def test_published_gradient() -> None:
    """The published divergence's gradient is (2f − y)/n, not the mean squared error's 2(f − y)/n."""
    f, y = randn(S, 3, 4), randn(S, 3, 4, seed=1)
    assert_relative(div.output_gradient(div.mse_published, f, y), (2 * f - y) / 12, TOLERANCE)
    assert_relative(div.output_gradient(div.mse, f, y), 2 * (f - y) / 12, TOLERANCE)


def test_published_detaches_the_reference() -> None:
    """Only the output of mean f·(f − y) is differentiated, even where the reference is the output itself."""
    leaf = randn(S, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(div.mse_published(leaf, leaf).sum(), leaf)
    assert_relative(gradient, leaf / 4, TOLERANCE)


@pytest.mark.parametrize("name", ["mse", "kl"])
def test_identical_outputs(name: str) -> None:
    """Of identical outputs the divergence is zero, and so is its gradient, exactly."""
    outputs = 30 * randn(S, 3, 7)
    assert not div.BY_NAME[name](outputs, outputs.clone()).any()
    assert not div.output_gradient(div.BY_NAME[name], outputs, outputs.clone()).any()


def test_kl_ignores_a_constant_added_to_the_logits() -> None:
    """Logits are a distribution up to a constant, in the output and in the reference."""
    f, y = randn(S, 7), randn(S, 7, seed=1)
    assert_relative(div.kl(f + 5, y - 3), div.kl(f, y), 1e-10)
    assert_relative(div.output_gradient(div.kl, f + 5, y - 3), div.output_gradient(div.kl, f, y), 1e-10)


def test_kl_points_from_the_reference_to_the_output() -> None:
    """KL(reference ‖ output), in nats: of a fair coin under a biased one."""
    fair, biased = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    assert_relative(
        div.kl(biased, fair)[0], torch.tensor(-0.5 * math.log(4 * 0.9 * 0.1), dtype=torch.float64), TOLERANCE
    )
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert_relative(div.kl(fair, biased)[0], torch.tensor(math.log(2) - entropy, dtype=torch.float64), TOLERANCE)


def test_kl_of_a_reference_that_rules_words_out() -> None:
    """A word of probability zero in the reference adds nothing."""
    f, y = randn(S, 7), randn(S, 7, seed=1)
    y[:, 2:4] = -1e5
    assert not y.softmax(-1)[:, 2:4].any()
    expected = F.kl_div(f.log_softmax(-1), y.softmax(-1), reduction="none").sum(-1)
    assert_relative(div.kl(f, y), expected, TOLERANCE)
    assert_relative(div.output_gradient(div.kl, f, y), f.softmax(-1) - y.softmax(-1), TOLERANCE)


@pytest.mark.parametrize("name", ["mse", "mse_published"])
def test_one_number_per_sample(name: str) -> None:
    """An output [S] is one number per sample."""
    outputs, targets = randn(S), randn(S, seed=1)
    expected = [VALUES[name](f, y) for f, y in zip(outputs, targets, strict=True)]
    assert_relative(div.BY_NAME[name](outputs, targets), torch.stack(expected), TOLERANCE)


@pytest.mark.parametrize("name", VALUES)
def test_the_gradient_holds_no_graph(name: str) -> None:
    """A reference with a graph behind it (another model's output) does not get into the gradient."""
    outputs, targets = randn(S, 7), randn(S, 7, seed=1).requires_grad_()
    assert not div.output_gradient(div.BY_NAME[name], outputs, references(targets, outputs)).requires_grad


def test_names_are_resolved() -> None:
    """A name gives the function of that name; a callable is taken as it is."""
    assert [div.resolve_divergence(name) for name in VALUES] == [div.mse, div.mse_published, div.kl]
    assert div.resolve_divergence(VALUES["mse"]) is VALUES["mse"]


# --- references -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [2, 3, 7])
def test_a_sample_never_refers_to_itself(n_samples: int) -> None:
    """Another sample is drawn, every other one equally often, whatever the seed."""
    outputs = torch.arange(float(n_samples))[:, None]
    drawn = Counter(
        (sample, int(reference))
        for seed in range(300)
        for sample, reference in enumerate(references("sample", outputs, seed=seed)[:, 0])
    )
    assert set(drawn) == {(s, r) for s in range(n_samples) for r in range(n_samples) if r != s}
    if n_samples > 2:  # five standard deviations of a binomial count
        expected = 300 / (n_samples - 1)
        assert max(abs(count - expected) for count in drawn.values()) < 5 * math.sqrt(expected)


def test_a_drawn_reference_is_a_whole_output() -> None:
    """The reference is one other sample's output, not a mixture of several."""
    outputs = randn(S, 3, 7)
    for reference, own in zip(references("sample", outputs), outputs, strict=True):
        assert sum(torch.equal(reference, other) for other in outputs) == 1
        assert not torch.equal(reference, own)


def test_the_draw_follows_the_generator() -> None:
    """The same seed draws the same references; torch's global generator is neither used nor moved."""
    outputs = randn(50, 7)
    first = references("sample", outputs, seed=3)
    state = torch.get_rng_state()
    assert torch.equal(references("sample", outputs, seed=3), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(references("sample", outputs, seed=4), first)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_is_of_the_outputs_or_of_the_probabilities(shape: tuple[int, ...]) -> None:
    """The mean output; for KL the reference's distribution is the mean of the distributions."""
    outputs = randn(S, *shape)
    assert_relative(references("mean", outputs), outputs.mean(0, keepdim=True).expand_as(outputs), TOLERANCE)
    of_probabilities = references("mean", outputs, is_kl=True).softmax(-1)
    assert_relative(of_probabilities, outputs.softmax(-1).mean(0, keepdim=True).expand_as(outputs), TOLERANCE)


def test_mean_of_confident_distributions() -> None:
    """Words to which every sample gives no measurable probability leave value and gradient finite."""
    outputs = torch.zeros(4, 5)
    outputs[:, 0] = 200
    reference = references("mean", outputs, is_kl=True)
    assert_relative(div.kl(outputs, reference), torch.zeros(4), TOLERANCE)
    assert_relative(div.output_gradient(div.kl, outputs, reference), torch.zeros(4, 5), TOLERANCE)


def test_uniform() -> None:
    """Equal logits, which are zeros."""
    assert torch.equal(references("uniform", randn(S, 3, 7)), torch.zeros(S, 3, 7, dtype=torch.float64))


def test_pair() -> None:
    """The contrasting input's output."""
    outputs, contrast = randn(S, 7), randn(S, 7, seed=1)
    assert torch.equal(references("pair", outputs, contrast=contrast), contrast)


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=["samples", "rows and positions"])
def test_tensors(leading: tuple[int, ...]) -> None:
    """A tensor may be given sample by sample or by row and position, in any floating dtype."""
    outputs, given = randn(S, 7), randn(S, 7, seed=1, dtype=torch.float32)
    reference = references(given.view(*leading, 7), outputs, is_kl=True, positions=3)
    assert torch.equal(reference, given.double())
    assert reference.dtype == outputs.dtype


@pytest.mark.parametrize("is_kl", [True, False])
def test_one_output_may_stand_for_all(is_kl: bool) -> None:
    """A tensor of one sample's shape is every sample's reference."""
    outputs, one = randn(S, 7), randn(7, seed=1)
    assert torch.equal(references(one, outputs, is_kl=is_kl), one.repeat(S, 1))


OTHER_SHAPES = [
    (5, 7),
    (6,),
    (1, 7),
    (6, 6),
    (6, 8),
    (6, 7, 1),
    (7, 6),
    (3, 14),
    (42,),
    (3, 2, 7),
    (2, 7, 3),
    (1, 6, 7),
]


@pytest.mark.parametrize("positions", [None, 3], ids=["rows", "positions"])
@pytest.mark.parametrize("shape", OTHER_SHAPES, ids=str)
def test_tensors_of_another_shape_are_refused(shape: tuple[int, ...], positions: int | None) -> None:
    """Neither broadcast nor reshaped: what is not the outputs' shape is refused by name."""
    with pytest.raises(ValueError, match="reference: expected outputs of shape"):
        references(randn(*shape), randn(S, 7), is_kl=True, positions=positions)


def test_one_sample_has_no_other() -> None:
    """With a single sample, "sample" is refused and the alternatives are named."""
    with pytest.raises(ValueError, match=r"reference: 'sample' needs at least two.*'mean', 'uniform' or a tensor"):
        references("sample", randn(1, 7))
    assert references("mean", randn(1, 7)).shape == (1, 7)
