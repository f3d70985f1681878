"""Extract per-sample gradients: which outputs are samples, how much is computed, and kinds of inputs and outputs."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from l3d.gradients.extract import Extractor, extract_gradients
from l3d.gradients.factors import Rows

from extraction import (
    LANGUAGE_MODELS,
    LENGTH,
    TOLERANCE,
    VOCABULARY,
    WIDTH,
    Head,
    all_places,
    assert_gradients,
    gpt2,
    llama,
    mlp,
    tokens,
    truth,
)
from helpers import assert_relative
from layer_checks import Net, mean_square, weight

pytestmark = pytest.mark.usefixtures("float64")


# --- language models: every position is a sample ----------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, LENGTH])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_position_of_a_language_model(name: str, tied: bool, rows: int) -> None:
    """Every position of every text is a sample, text by text, and its gradients are exact in all parameters."""
    model, inputs = LANGUAGE_MODELS[name](tied), tokens(rows)
    references = torch.randn(rows, LENGTH, VOCABULARY)
    gradients = extract_gradients(model, inputs, "kl", references)
    assert gradients.n_samples == rows * LENGTH
    assert_gradients(gradients, truth(model, inputs, references.flatten(0, 1), all_places(rows, LENGTH)))


@pytest.mark.parametrize("params", ["*head*", ["*head*", "*layers.0*"], "*layers.1.mlp*", "*embed*", "*norm*"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_some_parameters_of_a_language_model(tied: bool, params: str | list[str]) -> None:
    """A decomposed head, a block or a norm by itself gets the gradients it has among all parameters."""
    model, inputs = llama(tied), tokens()
    references = torch.randn(3 * LENGTH, VOCABULARY)
    expected = truth(model, inputs, references, all_places(3, LENGTH))
    gradients = extract_gradients(model, inputs, "kl", references, params)
    assert 0 < len(gradients.shapes) < len(expected)
    assert_gradients(gradients, expected)


def test_a_tied_head_is_found_by_either_name() -> None:
    """A tied table is one parameter under its first name, whichever of its names the pattern matches."""
    model = llama(tied=True)
    for pattern in ("lm_head.weight", "*embed_tokens*"):
        gradients = extract_gradients(model, tokens(), "kl", "mean", pattern)
        assert list(gradients.shapes) == ["model.embed_tokens.weight"]
        assert len(gradients.parts["model.embed_tokens.weight"]) == 2


@pytest.mark.parametrize("params", [None, "head.*"])
def test_a_decomposed_head_keeps_one_row_per_sample(params: str | None) -> None:
    """A sample holds only its own position's rows of a head's gradient: nothing grows with the vocabulary times T."""
    gradients = extract_gradients(Head(nn.Linear(WIDTH, 60, bias=False)), tokens(), "kl", "mean", params)
    (part,) = gradients.parts["head.weight"]
    assert isinstance(part, Rows)
    assert part.x.shape == (3 * LENGTH, 1, WIDTH)
    assert part.dy.shape == (3 * LENGTH, 1, 60)


@pytest.mark.parametrize("rows", [1, 3])
def test_last_position(rows: int) -> None:
    """positions="last" makes one sample of each row."""
    model, inputs = Head(), tokens(rows)
    references = torch.randn(rows, VOCABULARY)
    gradients = extract_gradients(model, inputs, "kl", references, positions="last")
    expected = truth(model, inputs, references, [(row, LENGTH - 1) for row in range(rows)])
    assert_gradients(gradients, expected)


@pytest.mark.parametrize("count", [1, 2, LENGTH])
def test_drawn_positions(count: int) -> None:
    """A number of positions draws that many of every row, without repetition, in order, from the generator alone."""
    model, inputs, rows = Head(), tokens(6), 6
    references = torch.randn(VOCABULARY).expand(rows * count, -1)
    every = truth(model, inputs, references[:1].expand(rows * LENGTH, -1), all_places(rows, LENGTH))
    drawn = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        actual = extract_gradients(model, inputs, "kl", references, "body.*", count, generator).materialize()
        chosen = []
        for sample, grad in enumerate(actual["body.weight"]):
            row = sample // count
            distance = (every["body.weight"][row * LENGTH : (row + 1) * LENGTH] - grad).abs().amax((1, 2))
            assert distance.min() < TOLERANCE
            chosen.append(int(distance.argmin()))
        drawn.append(torch.tensor(chosen).view(rows, count))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2]) == (count == LENGTH)
    assert all((positions.diff(dim=1) > 0).all() for positions in drawn)


def test_positions_are_ignored_where_a_row_is_a_sample() -> None:
    """The mean squared error takes a whole row for one sample, whatever its shape."""
    model, inputs = nn.Linear(6, 3), torch.randn(4, 5, 6)
    references = torch.randn(4, 5, 3)
    gradients = extract_gradients(model, inputs, "mse", references, positions="last")
    assert_gradients(gradients, truth(model, inputs, references, [(row,) for row in range(4)], mean_square))


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 2, 3)], ids=["vectors", "sequences", "grids"])
def test_kl_of_classes_sequences_and_grids(shape: tuple[int, ...]) -> None:
    """For "kl" every dimension between the first and the last is a position."""
    model, inputs = nn.Linear(6, 7), torch.randn(*shape, 6)
    references = torch.randn(inputs.shape[:-1].numel(), 7)
    gradients = extract_gradients(model, inputs, "kl", references)
    assert_gradients(gradients, truth(model, inputs, references, all_places(*shape)))


def distance(output: Tensor, reference: Tensor) -> Tensor:
    return (output - reference).flatten(1).square().exp().sum(1)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)], ids=["2-d output", "3-d output", "4-d output"])
def test_callable_divergence(shape: tuple[int, ...], positions: str, bias: bool) -> None:
    """A callable sees [S, ...]: dimension 1 is the position, and all after it is one sample's output."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 5, bias=bias))
    inputs = torch.randn(*shape, 6)
    places: list[tuple[int, ...]] = [(row,) for row in range(4)]
    if len(shape) > 1:
        places = all_places(*shape[:2]) if positions == "all" else [(row, shape[1] - 1) for row in range(4)]
    references = torch.randn(len(places), *shape[2:], 5)
    gradients = extract_gradients(model, inputs, distance, references, positions=positions)
    assert gradients.n_samples == len(places)

    def alone(output: Tensor, reference: Tensor) -> Tensor:
        return distance(output[None], reference[None])[0]

    assert_gradients(gradients, truth(model, inputs, references, places, alone))


def test_samples_are_ordered_row_by_row() -> None:
    """Sample s is position s % P of row s // P."""
    model, inputs = Head(), tokens()
    references = torch.randn(3, LENGTH, VOCABULARY)
    whole = extract_gradients(model, inputs, "kl", references).materialize()
    for row in range(3):
        alone = extract_gradients(model, inputs[row : row + 1], "kl", references[row]).materialize()
        for name, grad in alone.items():
            assert_relative(whole[name][row * LENGTH : (row + 1) * LENGTH], grad, TOLERANCE)


# --- what is computed, and what is not --------------------------------------------------------------------------


def extraction_flops(model: nn.Module, inputs: Tensor, divergence: str, params: Any = None) -> int:
    """Count the matrix multiply-adds of one extraction."""
    extractor = Extractor(model, divergence, "mean", params)
    extractor(inputs)  # the first batch is run once more, to see whether the model is a fixed function
    with FlopCounterMode(display=False) as counter:
        extractor(inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "params, backward",
    [
        (None, [(5, 4), (4, 3)]),
        ("0.*", [(5, 4), (4, 3)]),
        ("2.*", [(4, 3)]),
        (["2.bias", "4.*"], [(4, 3)]),
        ("4.*", []),
    ],
    ids=str,
)
def test_no_weight_gradient_and_nothing_below_the_first_layer(params: Any, backward: list[tuple[int, int]]) -> None:
    """The backward pass computes activation gradients only, and stops at the first decomposed layer."""
    forward = [(6, 5), (5, 4), (4, 3)]
    expected = sum(2 * 7 * wide * narrow for wide, narrow in forward + backward)
    assert extraction_flops(mlp(), torch.randn(7, 6), "mse", params) == expected


def test_the_vocabulary_is_multiplied_once() -> None:
    """With the shortcut the head's matrix enters one backward product for all positions together."""
    rows, width, vocabulary = 3, 16, 50
    model, inputs = Head(nn.Linear(width, vocabulary), width), tokens(rows)
    body, head = 2 * rows * LENGTH * width * width, 2 * rows * LENGTH * width * vocabulary
    # forward; the head once; every position through the body to the table
    assert extraction_flops(model, inputs, "kl") == (body + head) + head + LENGTH * body
    assert extraction_flops(model, inputs, "kl", "body.*") == (body + head) + head
    assert extraction_flops(model, inputs, "kl", "head.*") == body + head


def test_one_backward_pass_per_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of backward passes is the number of positions, not of samples."""
    passes: list[int] = []
    grad = torch.autograd.grad

    def counted(outputs: Any, inputs: Any, at_outputs: Any, is_grads_batched: bool = False, **options: Any) -> Any:
        passes.append(len(at_outputs[0]) if is_grads_batched else 1)
        return grad(outputs, inputs, at_outputs, is_grads_batched=is_grads_batched, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)

    def count(model: nn.Module, inputs: Tensor, divergence: Any, **options: Any) -> int:
        extractor = Extractor(model, divergence, "mean", **options)
        passes.clear()
        extractor(inputs)
        return sum(passes)

    assert count(mlp(), torch.randn(7, 6), "mse") == 1
    assert count(mlp(), torch.randn(7, 6), "kl") == 1
    assert count(nn.Linear(6, 3), torch.randn(7, 4, 6), "mse") == 1
    cumulative = Head(Net(lambda self, h: F.linear(h, self.w).cumsum(1), w=weight(9, WIDTH)))
    for rows in (1, 3, 7):
        assert count(cumulative, tokens(rows), "kl") == LENGTH
        assert count(cumulative, tokens(rows), "kl", positions=2) == 2
        assert count(cumulative, tokens(rows), "kl", positions="last") == 1
        assert count(Head(), tokens(rows), "kl") == LENGTH + 1  # one through the head


def test_an_operation_that_vmap_does_not_know_goes_one_pass_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients are the same, and later batches do not try again."""
    cumulative = Head(Net(lambda self, h: F.linear(h, self.w).cumsum(1), w=weight(9, WIDTH)))
    rows = tokens(3)
    expected = extract_gradients(cumulative, rows, "kl", "mean").materialize()
    grad, batched = torch.autograd.grad, []

    def refusing(*given: Any, is_grads_batched: bool = False, **options: Any) -> Any:
        batched.append(is_grads_batched)
        if is_grads_batched:
            raise RuntimeError("Batching rule not implemented for l3d::nothing")
        return grad(*given, **options)

    monkeypatch.setattr(torch.autograd, "grad", refusing)
    extractor = Extractor(cumulative, "kl", "mean")
    for _ in range(2):
        for name, found in extractor(rows).materialize().items():
            assert torch.equal(found, expected[name])
    assert sum(batched) == 1


def test_learned_positions_do_not_cost_a_pass_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's position table, looked up once for all rows, needs no backward pass of the model per sample."""
    from_output = Extractor._from_output
    names: list[str] = []

    def spy(self: Extractor, output: Tensor, samples: Any, d_out: Tensor, late: list[str]) -> Any:
        names.extend(late)
        return from_output(self, output, samples, d_out, late)

    monkeypatch.setattr(Extractor, "_from_output", spy)
    extract_gradients(gpt2(tied=True), tokens(), "kl", "mean")
    assert names == []


# --- samples are independent of one another ---------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(range(7)),
    cuts=st.sets(st.integers(1, 6), max_size=6),
    name=st.sampled_from(["mlp", "language model", "convolutions"]),
)
def test_gradients_do_not_depend_on_the_batch(order: list[int], cuts: set[int], name: str) -> None:
    """With given references a sample's gradient is the same however the batch is ordered and split."""
    torch.manual_seed(0)
    model, inputs, divergence, width = {
        "mlp": lambda: (mlp(), torch.randn(7, 6), "mse", (3,)),
        "language model": lambda: (Head(), tokens(7), "kl", (LENGTH, VOCABULARY)),
        "convolutions": lambda: (
            nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv1d(4, 4, 2, groups=2)),
            torch.randn(7, 2, 6),
            "mse",
            (4, 3),
        ),
    }[name]()
    references = torch.randn(7, *width)
    extractor = Extractor(model, divergence, references)
    whole = extractor(inputs).materialize()
    pieces = []
    for piece in np.split(np.array(order), sorted(cuts)):
        extractor.reference = references[piece]
        pieces.append(extractor(inputs[piece]).materialize())
    for key, grad in whole.items():
        by_row = grad.unflatten(0, (7, -1))
        rejoined = torch.cat([piece[key] for piece in pieces]).unflatten(0, (7, -1))
        assert_relative(rejoined, by_row[list(order)], 1e-12)


@pytest.mark.parametrize("divergence", ["mse", "mse_published"])
def test_scaling_of_the_output(divergence: str) -> None:
    """With a reference of zero, doubling a linear model's weights doubles their gradients."""
    model, inputs = nn.Linear(6, 3, bias=False), torch.randn(4, 6)
    before = extract_gradients(model, inputs, divergence, "uniform").materialize()["weight"]
    with torch.no_grad():
        model.weight.mul_(2)
    assert_relative(extract_gradients(model, inputs, divergence, "uniform").materialize()["weight"], 2 * before, 1e-12)


def test_drawn_references_follow_the_generator() -> None:
    """Which other sample's output is the reference is drawn from the given generator alone."""
    model, inputs = mlp(), torch.randn(8, 6)

    def extracted(seed: int) -> Tensor:
        return extract_gradients(model, inputs, generator=torch.Generator().manual_seed(seed)).materialize()["0.weight"]

    first = extracted(0)
    torch.manual_seed(1)
    assert torch.equal(extracted(0), first)
    assert not torch.equal(extracted(1), first)


# --- kinds of inputs and outputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["outside", "inside"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("reference", ["mean", "pair"])
def test_gradient_modes_outside_do_not_matter(mode: Any, made: str, reference: str) -> None:
    """Extraction works under no_grad and inference_mode, also with inputs that were made there."""
    for model, make in ((mlp(), lambda: torch.randn(4, 6)), (Head(), tokens)):
        inputs = (make(), make()) if reference == "pair" else make()
        expected = extract_gradients(model, inputs, "mse", reference).materialize()
        with mode():
            if made == "inside":
                inputs = tuple(t.clone() for t in inputs) if reference == "pair" else inputs.clone()
            actual = extract_gradients(model, inputs, "mse", reference).materialize()
        for name, grad in expected.items():
            assert torch.equal(actual[name], grad)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_mapping_inputs() -> None:
    """A mapping is passed as keyword arguments: what its mask hides is no sample, and changes no other's gradient."""
    model, ids = gpt2(tied=False), tokens(3, 4)
    references = torch.randn(3, 4, VOCABULARY)
    plain = extract_gradients(model, ids, "kl", references).materialize()
    mapping = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, grad in extract_gradients(model, mapping, "kl", references).materialize().items():
        assert_relative(grad, plain[name], TOLERANCE)
    padded = {
        "input_ids": F.pad(ids, (0, 2)),
        "attention_mask": F.pad(torch.ones_like(ids), (0, 2)),
        "position_ids": torch.arange(6).expand(3, -1),
    }
    longer = extract_gradients(model, padded, "kl", F.pad(references, (0, 0, 0, 2))).materialize()
    for name, grad in longer.items():
        assert_relative(grad, plain[name], TOLERANCE)


def test_mean_reference_of_confident_models() -> None:
    """The mean reference is finite where no sample gives a word a measurable probability."""
    model = nn.Linear(6, 5).float()
    with torch.no_grad():
        model.bias.copy_(torch.tensor([300.0, 0.0, 0.0, 300.0, 0.0]))
    inputs = torch.randn(4, 6).float()
    p = model(inputs).softmax(-1).detach()
    assert not p[:, 1].any()
    actual = extract_gradients(model, inputs, "kl", "mean").materialize()["bias"]
    assert_relative(actual, p - p.mean(0), 1e-5)


def test_a_tuple_of_input_and_label() -> None:
    """Of (input, label) the label is ignored."""
    model, inputs = mlp(), torch.randn(4, 6)
    expected = extract_gradients(model, inputs, reference="mean").materialize()
    for batch in ((inputs, torch.arange(4)), [inputs, torch.arange(4)], (inputs,)):
        for name, grad in extract_gradients(model, batch, reference="mean").materialize().items():
            assert torch.equal(grad, expected[name])


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("wrap", [Output, lambda t: {"logits": t}, lambda t: t], ids=["attribute", "key", "tensor"])
def test_outputs_with_logits(wrap: Callable[[Tensor], Any]) -> None:
    """An output may be a tensor or anything that has logits, by attribute or by key."""
    inner = mlp()
    model = Net(lambda self, x: wrap(self.inner(x)), inner=inner)
    inputs, reference = torch.randn(4, 6), torch.randn(4, 3)
    expected = extract_gradients(inner, inputs, "mse", reference).materialize()
    for name, grad in extract_gradients(model, inputs, "mse", reference).materialize().items():
        assert torch.equal(grad, expected[name.removeprefix("inner.")])


def test_pairs_are_contrasted_row_by_row() -> None:
    """reference="pair" contrasts every row with its own partner."""
    model, inputs, contrast = mlp(), torch.randn(4, 6), torch.randn(4, 6)
    actual = extract_gradients(model, (inputs, contrast), "mse", "pair").materialize()
    expected = extract_gradients(model, inputs, "mse", model(contrast)).materialize()
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad)


def test_one_dimensional_outputs() -> None:
    """A regression with one number per row is a sample per row."""
    model = Net(lambda self, x: self.inner(x)[:, 0], inner=mlp())
    inputs, references = torch.randn(4, 6), torch.randn(4)
    gradients = extract_gradients(model, inputs, "mse", references)
    assert_gradients(gradients, truth(model, inputs, references, [(row,) for row in range(4)], mean_square))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Gradients of a low-precision model come in its precision, as its autograd's do."""
    model, inputs = mlp().to(dtype), torch.randn(4, 6).to(dtype)
    references = torch.randn(4, 3).to(dtype)
    gradients = extract_gradients(model, inputs, "mse", references)
    assert gradients.dtype == dtype
    expected = truth(copy.deepcopy(model).double(), inputs.double(), references.double(), [(r,) for r in range(4)],
                     mean_square)  # fmt: skip
    for name, grad in gradients.materialize().items():
        assert grad.dtype == dtype
        assert_relative(grad, expected[name], 32 * torch.finfo(dtype).eps)


def test_logits_cast_to_float32() -> None:
    """A half-precision model that returns float32 logits has gradients of one dtype, the one that they tell."""
    inner = mlp().bfloat16()
    model = Net(lambda self, x: self.inner(x).float(), inner=inner)
    gradients = extract_gradients(model, torch.randn(4, 6).bfloat16(), "kl", "mean")
    assert {tensor.dtype for _, tensor in gradients.tensors()} == {gradients.dtype}
    assert {tensor.dtype for _, tensor in gradients.to(torch.zeros(1, dtype=torch.float64)).tensors()} == {
        torch.float64
    }
