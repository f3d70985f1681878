"""Refuse bad models, inputs, references, divergences and positions; each error names the argument."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3d.gradients.extract import Extractor, extract_gradients

from extraction import (
    LENGTH,
    VOCABULARY,
    Head,
    assert_same,
    mlp,
    tokens,
)
from helpers import assert_relative
from layer_checks import Net, weight

pytestmark = pytest.mark.usefixtures("float64")


def refuse(match: str, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        extract_gradients(model, inputs, *args, **options)


PATTERNS = [
    ("0.wieght", r"params: .*'0\.wieght'.*near matches: .*0\.weight"),
    ("1.weigh", r"params: .*near matches: "),
    (["0.*", "body.*"], r"params: .*'body\.\*'.*near matches: "),
    ("0.*,1.*", r"params: .*near matches: .*; several patterns are a list: \[\"0\.\*\",\"1\.\*\"\]$"),
    ("0.weight, 1.bias", r"params: .*; several patterns are a list: \[\"0\.weight\",\"1\.bias\"\]$"),
    ([], r"params: .*empty list"),
    ((), r"params: .*empty list"),
    ("", r"params: .*''"),
]


@pytest.mark.parametrize("params, match", PATTERNS, ids=str)
def test_patterns_that_match_nothing(params: Any, match: str) -> None:
    """Every pattern must match; the message names the one that does not, and what is near."""
    refuse(match, mlp(), torch.randn(4, 6), params=params)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Dropout(0.1),
        lambda: nn.Dropout1d(0.1),
        lambda: nn.AlphaDropout(0.1),
        lambda: nn.BatchNorm1d(6),
        lambda: nn.SyncBatchNorm(6),
        lambda: nn.MultiheadAttention(6, 2, dropout=0.1),
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1),
        lambda: nn.LSTM(6, 6, 2, dropout=0.1),
        lambda: nn.InstanceNorm1d(6, track_running_stats=True),
    ],
    ids=lambda make: type(make()).__name__,
)
def test_training_mode_that_acts_is_refused(make: Callable[[], nn.Module]) -> None:
    """A layer that drops out or gathers statistics in training mode is named, and its buffers stay as they are."""
    model = Net(lambda self, x: self.first(x), first=nn.Linear(6, 3), inner=make()).train()
    model.function = lambda self, x: self.first(x) + sum(b.sum() for b in self.inner.buffers() if b.is_floating_point())
    before = copy.deepcopy(model.state_dict())
    refuse(r"model: 'inner.*training mode.*eval\(\)", model, torch.randn(4, 6), params="first.*")
    assert_same(dict(model.state_dict()), dict(before))
    extract_gradients(model.eval(), torch.randn(4, 6), params="first.*")


def test_buffers_changed_by_the_forward_pass_are_refused() -> None:
    """A spectral norm in training mode iterates: the forward pass changes the model, and that is said."""
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)).train()
    refuse("model: ", model, torch.randn(4, 6), reference="mean")
    extract_gradients(model.eval(), torch.randn(4, 6), reference="mean")


@pytest.mark.parametrize(
    "make", [lambda: nn.Dropout(0.0), lambda: nn.LayerNorm(6), lambda: nn.MultiheadAttention(6, 2)]
)
def test_training_mode_that_does_not_act_is_taken(make: Callable[[], nn.Module]) -> None:
    """A model in training mode is fine where nothing in it acts differently."""
    model = Net(lambda self, x: self.first(x), first=nn.Linear(6, 3), inner=make()).train()
    inputs = torch.randn(4, 6)
    gradients = extract_gradients(model, inputs, reference="mean", params="first.*").materialize()
    for name, grad in extract_gradients(model.eval(), inputs, reference="mean", params="first.*").materialize().items():
        assert torch.equal(gradients[name], grad)


def test_a_submodule_put_into_training_mode_later_is_refused() -> None:
    """The mode is looked at before every batch, in every module."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    extractor = Extractor(model, reference="mean")
    extractor(torch.randn(4, 6))
    model[1].train()
    before = model[1].running_mean.clone()
    with pytest.raises(ValueError, match=r"model: '1' \(BatchNorm1d\) is in training mode"):
        extractor(torch.randn(4, 6))
    assert torch.equal(model[1].running_mean, before)


RANDOM: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "functional dropout": lambda self, x: F.dropout(self.inner(x)),
    "noise": lambda self, x: self.inner(x + torch.randn_like(x)),
    "attention dropout": lambda self, x: F.scaled_dot_product_attention(x, self.inner(x), x, dropout_p=0.5),
}


@pytest.mark.parametrize("name", RANDOM)
def test_randomness_in_the_forward_pass_is_refused(name: str) -> None:
    """A forward pass that draws random numbers is no fixed function; the generator comes back where it was."""
    model = Net(RANDOM[name], inner=nn.Linear(6, 6)).eval()
    state = torch.get_rng_state()
    refuse(r"model: .*random numbers", model, torch.randn(4, 2, 6, generator=torch.Generator()), reference="mean")
    assert torch.equal(torch.get_rng_state(), state)


def test_randomness_in_the_contrast_is_refused() -> None:
    """The contrasting pass of a pair is held to the same."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), training=bool(x[0, 0] > 0))

    model = Net(forward, inner=nn.Linear(6, 6)).eval()
    refuse(r"model: .*random numbers", model, (-torch.rand(4, 6), torch.rand(4, 6) + 1), reference="pair")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["inputs", "weights", "contrast", "reference"])
def test_outputs_that_are_not_finite_are_refused(where: str, value: float) -> None:
    """NaN or infinity, in an output, a contrast or a reference, is named rather than passed on."""
    model, inputs, contrast, reference = mlp(), torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 3)
    last = nn.Linear(6, 3)
    if where == "inputs":
        inputs[2, 3] = value
        model = last
    elif where == "weights":
        model[4].bias.data[1] = value
    elif where == "contrast":
        contrast[2, 3] = value
        refuse("NaN|finite", last, (inputs, contrast), reference="pair")
        return
    else:
        reference[1, 2] = value
    refuse("NaN|finite", model, inputs, reference=reference)


def test_a_divergence_whose_gradient_is_not_finite_is_refused() -> None:
    """A norm of a difference has no gradient where the difference is zero; that is said, not returned as NaN."""
    model, inputs = nn.Linear(6, 3), torch.randn(4, 6)
    refuse("divergence", model, inputs, lambda f, y: (f - y).square().sum(1).sqrt(), model(inputs).detach())


@pytest.mark.parametrize("output", [None, 3.0, (1, 2), {"hidden": 1}, []], ids=str)
def test_outputs_that_are_no_tensor_are_refused(output: Any) -> None:
    """A model must return a tensor or something with logits."""
    refuse(
        r"model: expected a tensor or something with \.logits", Net(lambda self, x: output, w=weight(1)), torch.ones(2)
    )


def test_zero_rows_are_refused() -> None:
    """A batch without rows has no samples."""
    refuse("data: expected at least one sample", mlp(), torch.randn(0, 6))


def test_an_output_without_rows_is_refused() -> None:
    """A scalar output has no samples either."""
    refuse(
        "data: expected at least one sample", Net(lambda self, x: self.w.sum() * x.sum(), w=weight(2)), torch.ones(3)
    )


def test_parameters_without_entries_are_refused() -> None:
    """A parameter without entries has nothing to decompose; beside others it does not matter."""
    model = Net(lambda self, x: self.inner(x), inner=nn.Linear(6, 3), empty=nn.Parameter(torch.empty(0, 4)))
    refuse("params: ", model, torch.randn(4, 6), params="empty")
    assert list(extract_gradients(model, torch.randn(4, 6)).shapes) == ["inner.weight", "inner.bias"]


def test_parameters_the_output_does_not_depend_on_are_refused() -> None:
    """If the output depends on none of the chosen parameters, there is nothing to decompose."""
    refuse(
        r"params: .*none of c", Net(lambda self, x: x * self.w, w=weight(3), c=weight(2)), torch.ones(4, 3), params="c"
    )


@pytest.mark.parametrize("shape", [(4,), (2,), (4, 2), (5, 3), (4, 3, 2), (3, 4), (12,), (2, 2, 3), (1, 3)], ids=str)
def test_references_of_the_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    """A reference must have the outputs' shape; as many numbers in another shape are not the same outputs."""
    refuse("reference: expected outputs of shape", mlp(), torch.randn(4, 6), "mse", torch.randn(shape))


@pytest.mark.parametrize("shape", [(LENGTH, 3, VOCABULARY), (3, VOCABULARY, LENGTH), (3 * VOCABULARY, LENGTH)], ids=str)
def test_transposed_references_are_refused(shape: tuple[int, ...]) -> None:
    """[S, ...] or [B, positions, ...], and no other arrangement of as many numbers."""
    refuse("reference: expected outputs of shape", Head(), tokens(), "kl", torch.randn(shape))


class Unhashable:
    """A callable divergence that cannot be a dictionary's key."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, output: Tensor, reference: Tensor) -> Tensor:
        return (output - reference).flatten(1).square().mean(1)


def test_any_callable_is_a_divergence() -> None:
    """A callable need not be hashable."""
    model, inputs, reference = mlp(), torch.randn(4, 6), torch.randn(4, 3)
    expected = extract_gradients(model, inputs, "mse", reference).materialize()
    for name, grad in extract_gradients(model, inputs, Unhashable(), reference).materialize().items():
        assert_relative(grad, expected[name], 1e-12)


@pytest.mark.parametrize("value", ["KL", "mean", 3, ["kl"], {"kl": 1}], ids=str)
def test_unknown_divergences_are_refused(value: Any) -> None:
    """Only the names that exist, or a callable."""
    refuse("divergence: expected mse, mse_published, kl or a callable", mlp(), torch.randn(4, 6), value)


@pytest.mark.parametrize("value", ["Sample", "zero", 3, None, ["sample"], np.zeros((4, 3))], ids=str)
def test_unknown_references_are_refused(value: Any) -> None:
    """Only the names that exist, or a tensor."""
    refuse("reference: expected sample, mean, uniform, pair or a tensor", mlp(), torch.randn(4, 6), "mse", value)


@pytest.mark.parametrize("value", ["first", 0, -1, 2.0, True, None, [1]], ids=str)
def test_unknown_positions_are_refused(value: Any) -> None:
    """Only the names that exist, or a positive number."""
    refuse("positions: expected 'all', 'last' or a positive number", Head(), tokens(), "kl", "mean", positions=value)


def test_more_positions_than_there_are_is_refused() -> None:
    """At most every position can be drawn."""
    refuse("positions: expected at most the output's 5, got 6", Head(), tokens(), "kl", "mean", positions=LENGTH + 1)


RETURNS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a scalar": lambda f, y: (f - y).square().mean(),
    "a value per output": lambda f, y: (f - y).square(),
    "a column": lambda f, y: (f - y).square().sum(1, keepdim=True),
    "too few": lambda f, y: (f - y).square().sum(1)[1:],
    "a number": lambda f, y: 1.0,
    "nothing": lambda f, y: None,
}


@pytest.mark.parametrize("name", RETURNS)
def test_divergences_of_the_wrong_shape_are_refused(name: str) -> None:
    """A divergence returns one value per sample."""
    refuse(r"divergence: expected one value per sample, shape \[4\]", mlp(), torch.randn(4, 6), RETURNS[name], "mean")


def test_a_divergence_without_a_gradient_gives_zeros() -> None:
    """A divergence that does not depend on the output has a gradient of exactly zero."""
    gradients = extract_gradients(mlp(), torch.randn(4, 6), lambda f, y: y.sum(1), "mean")
    assert not gradients.squared_norm().any()


def test_kl_of_one_number_per_row_is_refused() -> None:
    """There is no distribution over the last dimension where the last dimension is the batch."""
    model = Net(lambda self, x: self.inner(x)[:, 0], inner=mlp())
    refuse("divergence", model, torch.randn(4, 6), "kl", "mean")


def test_a_sample_for_reference_needs_two() -> None:
    """One sample has no other to refer to; one row of several positions has."""
    refuse("reference: 'sample' needs at least two samples", mlp(), torch.randn(1, 6))
    assert extract_gradients(Head(), tokens(1), "kl").n_samples == LENGTH


@pytest.mark.parametrize(
    "inputs", [torch.ones(4, 6), [torch.ones(4, 6)], (torch.ones(4, 6),) * 3, {"x": torch.ones(4, 6)}]
)
def test_pairs_need_pairs(inputs: Any) -> None:
    """reference="pair" needs (input, contrast)."""
    refuse("reference: 'pair' needs data", mlp(), inputs, reference="pair")


def test_pairs_of_different_shape_are_refused() -> None:
    """Input and contrast must have outputs of the same shape."""
    refuse(
        r"data: the contrast's output has shape \[3, 3\]", mlp(), (torch.ones(4, 6), torch.ones(3, 6)), reference="pair"
    )


def by_frequency(self: Any, ids: Tensor) -> Tensor:
    return F.embedding(ids, self.w, scale_grad_by_freq=True).cumsum(1)


def by_frequency_of_a_slice(self: Any, ids: Tensor) -> Tensor:
    return F.embedding(ids, self.w[:VOCABULARY], scale_grad_by_freq=True).cumsum(1)


def by_frequency_and_permuted(self: Any, ids: Tensor) -> Tensor:
    return F.embedding(ids, self.w, scale_grad_by_freq=True).cumsum(1).flip(0)


def by_frequency_in_bags(self: Any, ids: Tensor) -> Tensor:
    return F.embedding_bag(ids, self.w, mode="sum", scale_grad_by_freq=True)


@pytest.mark.parametrize(
    "function", [by_frequency, by_frequency_of_a_slice, by_frequency_and_permuted, by_frequency_in_bags]
)
def test_embeddings_scaled_by_frequency_are_refused(function: Callable[[Any, Tensor], Tensor]) -> None:
    """A gradient that is scaled by the frequency in the batch is no sample's own, whichever path computes it."""
    model = Net(function, w=weight(VOCABULARY + 2, 3))
    refuse("params: .*frequency", model, tokens(), "mse", "mean")


@pytest.mark.parametrize("params", [None, "1.*"], ids=["chosen", "not chosen"])
def test_embeddings_with_a_maximal_norm_are_refused(params: Any) -> None:
    """A forward pass that renormalises its table changes the model; it is refused, and the table is as it was."""
    model = nn.Sequential(nn.Embedding(VOCABULARY, 3, max_norm=0.1), nn.Linear(3, 2))
    before = model[0].weight.detach().clone()
    refuse("max_norm", model, tokens(), "mse", "mean", params)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.complex128], ids=str)
def test_parameters_that_are_not_real_numbers(dtype: torch.dtype) -> None:
    """Boolean, integer and complex parameters cannot be chosen, but may be there."""
    p = nn.Parameter(torch.ones(6, dtype=dtype), requires_grad=dtype.is_complex)
    model = Net(lambda self, x: (self.inner(x) * self.p).real, inner=nn.Linear(6, 6), p=p)
    if not dtype.is_complex:
        model.function = lambda self, x: self.inner(x) * self.p
    refuse("params: 'p' is torch", model, torch.randn(4, 6))
    refuse("params: 'p' is torch", model, torch.randn(4, 6), params="p")
    gradients = extract_gradients(model, torch.randn(4, 6), params="inner.*")
    assert p.requires_grad == dtype.is_complex
    assert gradients.squared_norm().all()


def test_the_output_width_may_not_change_between_batches() -> None:
    """One extractor's samples have one shape; the number of rows and of positions is free."""
    extractor = Extractor(nn.Linear(6, 3), "mse", "mean")
    for rows in (4, 2):
        extractor(torch.randn(rows, 5, 6))
    with pytest.raises(ValueError, match=r"data: the shape of one sample's output changed"):
        extractor(torch.randn(4, 7, 6))
    extractor = Extractor(Head(), "kl", "mean")
    for length in (5, 7, 2):
        assert extractor(tokens(3, length)).n_samples == 3 * length
