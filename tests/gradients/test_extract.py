"""Samples, divergences and backward passes of gradient extraction; what it leaves alone, and what it refuses."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from l3d.gradients import extract
from l3d.gradients.extract import Extractor, extract_gradients
from l3d.gradients.factors import Rows

from helpers import assert_relative

TOLERANCE = 1e-10
VOCABULARY, WIDTH, LENGTH = 11, 4, 5


pytestmark = pytest.mark.usefixtures("float64")


class Head(nn.Module):
    """A small language model (a causal mix of earlier positions) under any head."""

    def __init__(self, head: nn.Module | None = None, width: int = WIDTH) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False) if head is None else head

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.body(self.table(ids).cumsum(1)))
        return self.head(h + h.cumsum(1).sin())


class Over(nn.Module):
    """A head made of a function of (self, h) and the parameters it names."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self, h)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def tokens(rows: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length))


def gpt2(tied: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=2, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return enlarged(GPT2LMHeadModel(config))


def llama(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return enlarged(LlamaForCausalLM(config))


def enlarged(model: nn.Module) -> nn.Module:
    """Fresh weights are tiny, and biases zero: give each entry a size that shows."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.double().eval()


LANGUAGE_MODELS = {"gpt2": gpt2, "llama": llama}


def logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)


def kl(output: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) ‖ softmax(output)), written with torch's own."""
    return F.kl_div(output.log_softmax(-1), reference.log_softmax(-1), reduction="sum", log_target=True)


def mean_square(output: Tensor, reference: Tensor) -> Tensor:
    return (output - reference).square().mean()


def truth(
    model: nn.Module,
    inputs: Tensor,
    references: Tensor,
    places: list[tuple[int, ...]],
    divergence: Callable[[Tensor, Tensor], Tensor] = kl,
) -> dict[str, Tensor]:
    """torch.func's gradient of every sample's divergence, its row alone in the batch.

    A sample is an entry of the output: places[s] = (row, position, ...); references[s] is its reference output.
    """
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], sample: int) -> Tensor:
        row, *place = places[sample]
        output = logits(functional_call(model, params, (inputs[row : row + 1],)))
        return divergence(output[(0, *place)], references[sample])

    grads = [torch.func.grad(loss)(params, sample) for sample in range(len(places))]
    return {name: torch.stack([grad[name] for grad in grads]) for name in params}


def all_places(rows: int, *positions: int) -> list[tuple[int, ...]]:
    return [tuple(place) for place in np.ndindex(rows, *positions)]


def assert_gradients(gradients: Any, expected: dict[str, Tensor]) -> None:
    """Compare every parameter's gradients and the squared norm, the latter before anything is multiplied out."""
    squared_norm = gradients.squared_norm()
    actual = gradients.materialize()
    for name in gradients.shapes:
        assert_relative(actual[name], expected[name], TOLERANCE)
    total = sum(expected[name].reshape(gradients.n_samples, -1).square().sum(1) for name in gradients.shapes)
    assert_relative(squared_norm, total, TOLERANCE)


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
    """Of a head's gradient a sample keeps its own position's rows only: nothing grows with the vocabulary times T."""
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


# --- the head shortcut ------------------------------------------------------------------------------------------


def capped(self: Any, h: Tensor) -> Tensor:
    return 3 * torch.tanh(F.linear(h, self.w, self.b) / 3)


def linear_head() -> dict[str, Any]:
    return {"w": weight(VOCABULARY, WIDTH), "b": weight(VOCABULARY)}


TAKEN: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Linear(WIDTH, VOCABULARY, bias=False),
    "bias": lambda: nn.Linear(WIDTH, VOCABULARY),
    "scaled": lambda: Over(lambda self, h: 0.3 * F.linear(h, self.w, self.b), **linear_head()),
    "divided": lambda: Over(lambda self, h: F.linear(h, self.w, self.b) / 7, **linear_head()),
    "scaled by a tensor": lambda: Over(lambda self, h: F.linear(h, self.w) * torch.tensor(0.3), w=weight(9, WIDTH)),
    "vocabulary slice": lambda: Over(lambda self, h: F.linear(h, self.w, self.b)[..., 2:9], **linear_head()),
    "every other word": lambda: Over(lambda self, h: F.linear(h, self.w, self.b)[..., ::2], **linear_head()),
    "soft-capped": lambda: Over(capped, **linear_head()),
    "stored as [in, out]": lambda: Over(lambda self, h: h @ self.w, w=weight(WIDTH, 9)),
    "addmm": lambda: Over(
        lambda self, h: torch.addmm(self.b, h.flatten(0, 1), self.w, alpha=0.5, beta=2).unflatten(0, h.shape[:2]),
        w=weight(WIDTH, 9),
        b=weight(9),
    ),
    "cast": lambda: Over(lambda self, h: F.linear(h, self.w).to(torch.float64, copy=True), w=weight(9, WIDTH)),
}


def rolled(self: Any, h: Tensor) -> Tensor:
    return F.linear(h, self.w).roll(1, 1)


def attending(self: Any, h: Tensor) -> Tensor:
    """The output of an attention over a batch of one, a plain matrix product of two activations."""
    y = torch.softmax(h[0] @ h[0].T, -1) @ F.linear(h[0], self.w)
    return y.view(1, *y.shape)


NOT_TAKEN: dict[str, Callable[[], nn.Module]] = {
    "cumsum over positions": lambda: Over(lambda self, h: F.linear(h, self.w).cumsum(1), w=weight(9, WIDTH)),
    "cumsum over the vocabulary": lambda: Over(lambda self, h: F.linear(h, self.w).cumsum(-1), w=weight(9, WIDTH)),
    "rolled positions": lambda: Over(rolled, w=weight(9, WIDTH)),
    "positions mixed by a constant": lambda: Over(
        lambda self, h: torch.ones(h.shape[1], h.shape[1]).tril() @ F.linear(h, self.w), w=weight(9, WIDTH)
    ),
    "a term that mixes positions": lambda: Over(
        lambda self, h: F.linear(h, self.w) + F.linear(h, self.w.sin()).cumsum(1), w=weight(9, WIDTH)
    ),
    "a bias by itself": lambda: Over(lambda self, h: F.linear(h, self.w) + self.b, **linear_head()),
    "a learned scale": lambda: Over(lambda self, h: self.c * F.linear(h, self.w), w=weight(9, WIDTH), c=weight(1)),
    "a scale per position": lambda: Over(
        lambda self, h: F.linear(h, self.w) * torch.arange(1.0, h.shape[1] + 1)[:, None], w=weight(9, WIDTH)
    ),
    "positions cut off": lambda: Over(lambda self, h: F.linear(h, self.w)[:, 1:], w=weight(9, WIDTH)),
    "rows cut off": lambda: Over(lambda self, h: F.linear(torch.cat([h, h]), self.w)[len(h) :], w=weight(9, WIDTH)),
    "two heads side by side": lambda: Over(
        lambda self, h: torch.cat([F.linear(h, self.w), F.linear(h.sin(), self.w)], -1), w=weight(9, WIDTH)
    ),
    "logits read as another shape": lambda: Over(
        lambda self, h: F.linear(h, self.w).reshape(len(h), -1, 3), w=weight(9, WIDTH)
    ),
    "log-probabilities": lambda: Over(lambda self, h: F.linear(h, self.w).log_softmax(-1), w=weight(9, WIDTH)),
    "weight on the left": lambda: Over(
        lambda self, h: (self.w @ h.flatten(0, 1).T).T.unflatten(0, h.shape[:2]), w=weight(9, WIDTH)
    ),
}
COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "a normalised weight": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, VOCABULARY)),
    "a scaled weight": lambda: Over(lambda self, h: F.linear(h, 2 * self.w), w=weight(9, WIDTH)),
    "a low-rank update": lambda: Over(
        lambda self, h: h @ (self.w + self.a @ self.b), w=weight(WIDTH, 9), a=weight(WIDTH, 2), b=weight(2, 9)
    ),
    "a slice of a weight": lambda: Over(lambda self, h: F.linear(h, self.w[2:]), w=weight(11, WIDTH)),
    "a weight made of activations": lambda: Over(lambda self, h: h @ (self.w * h.sum()), w=weight(WIDTH, 9)),
}


def check_head(head: nn.Module, rows: int, whole_batch: bool = False) -> None:
    """Hold the gradients under a head against plain autograd, position by position."""
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
    """Whether the head shortcut was found, at every extraction."""
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
    """Where the output is the head's own result, passed position by position, the vocabulary is left behind."""
    check_head(TAKEN[name](), rows)
    assert shortcuts == [True]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", NOT_TAKEN)
def test_shortcut_is_not_taken(name: str, rows: int, shortcuts: list[bool]) -> None:
    """Where anything but the head's own result is the output, plain autograd does the work."""
    check_head(NOT_TAKEN[name](), rows)
    assert shortcuts == [False]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", COMPUTED)
def test_heads_with_a_computed_weight(name: str, rows: int) -> None:
    """A head whose weight is itself computed is exact: what made the weight is not forgotten."""
    check_head(COMPUTED[name](), rows)


def test_a_product_of_activations_is_not_a_head() -> None:
    """The last product of an attention, whose right-hand side is an activation too, is differentiated in both."""
    check_head(Over(attending, w=weight(9, WIDTH)), rows=1)


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


# --- what is computed, and what is not --------------------------------------------------------------------------


def extraction_flops(model: nn.Module, inputs: Tensor, divergence: str, params: Any = None) -> int:
    """Count the matrix multiply-adds of one extraction."""
    extractor = Extractor(model, divergence, "mean", params)
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
    """The backward pass forms activation gradients only, and stops at the first decomposed layer."""
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
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: passes.append(1) or grad(*args, **options))

    def count(model: nn.Module, inputs: Tensor, divergence: Any, **options: Any) -> int:
        extractor = Extractor(model, divergence, "mean", **options)
        passes.clear()
        extractor(inputs)
        return len(passes)

    assert count(mlp(), torch.randn(7, 6), "mse") == 1
    assert count(mlp(), torch.randn(7, 6), "kl") == 1
    assert count(nn.Linear(6, 3), torch.randn(7, 4, 6), "mse") == 1
    cumulative = Head(Over(lambda self, h: F.linear(h, self.w).cumsum(1), w=weight(9, WIDTH)))
    for rows in (1, 3, 7):
        assert count(cumulative, tokens(rows), "kl") == LENGTH
        assert count(cumulative, tokens(rows), "kl", positions=2) == 2
        assert count(cumulative, tokens(rows), "kl", positions="last") == 1
        assert count(Head(), tokens(rows), "kl") == LENGTH + 1  # one through the head


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


# --- the model is left as it was --------------------------------------------------------------------------------


class Remembering(nn.Module):
    """A model with a bit of everything that an extraction could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.drop = nn.Dropout(0.5)
        self.b = nn.Linear(6, 3)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.a(x))) + self.frozen(x)
        if self.fails:
            raise KeyError("the model's own error")
        return self.b(F.relu(h, inplace=True))


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and the random generators that must not change."""
    return {
        "tensors": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "versions": [t._version for t in (*model.parameters(), *model.buffers())],
        "addresses": [t.data_ptr() for t in (*model.parameters(), *model.buffers())],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [[len(getattr(module, name)) for name in HOOKS] for module in model.modules()],
        "parameter hooks": [p._backward_hooks for p in model.parameters()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def assert_same(actual: Any, expected: Any, where: str = "state") -> None:
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert list(actual) == list(expected), where
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}: {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e, where)
    elif isinstance(expected, Tensor):
        assert torch.equal(actual, expected), where
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(actual, expected), where
    else:
        assert actual == expected, where


@pytest.mark.parametrize("outcome", ["success", "failure in forward", "refusal"])
@pytest.mark.parametrize("params", [None, "a.*", ["frozen.weight", "b.bias"]], ids=str)
def test_the_model_comes_back_as_it_was(params: Any, outcome: str) -> None:
    """Flags, gradients, hooks, modes, parameters, buffers and generators are the same after any outcome."""
    model = Remembering().eval()
    model.norm.train(False)
    model.b.weight.grad = torch.randn(3, 6)
    model.a.register_forward_hook(lambda module, args, output: None)
    model.a.weight.register_hook(lambda grad: grad)
    inputs = torch.randn(4, 6)
    before = state_of(model)
    if outcome == "success":
        generator = torch.Generator().manual_seed(0)
        extract_gradients(model, inputs, "mse", "sample", params, generator=generator).materialize()
    elif outcome == "refusal":
        with pytest.raises(ValueError, match="reference"):
            extract_gradients(model, inputs, "mse", torch.zeros(7), params)
    else:
        model.fails = True
        with pytest.raises(KeyError, match="own error"):
            extract_gradients(model, inputs, "mse", "mean", params)
        model.fails = False
    assert_same(state_of(model), before)


def test_generators_come_back_when_the_model_draws_and_fails() -> None:
    """A model that draws random numbers and then fails leaves the generator where it was."""

    def forward(self: Any, x: Tensor) -> Tensor:
        torch.rand(3)
        raise KeyError("the model's own error")

    model, inputs = Over(forward, w=weight(2)), torch.randn(4, 6)
    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        extract_gradients(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_language_model_comes_back_as_it_was() -> None:
    """The same for a tied language model with drawn positions and references."""
    model, inputs = gpt2(tied=True), tokens()
    before = state_of(model)
    extract_gradients(model, inputs, "kl", "sample", "*attn*", 2, torch.Generator().manual_seed(0)).squared_norm()
    assert_same(state_of(model), before)


@pytest.mark.parametrize("rows", [1, 4])
def test_gradients_hold_no_graph(rows: int) -> None:
    """What comes back requires no gradient, so nothing of the model's graph is kept alive by it."""
    model = mlp()
    gradients = extract_gradients(model, torch.randn(rows, 6), "mse", model(torch.randn(rows, 6)))
    assert [tensor.requires_grad for _, tensor in gradients.tensors()] == [False] * len(list(gradients.tensors()))


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
    """Another sample's output is drawn from the generator given, and from nothing else."""
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
    """Words that no sample gives a measurable probability do not stand in the way of the mean reference."""
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
    model = Over(lambda self, x: wrap(self.inner(x)), inner=inner)
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
    model = Over(lambda self, x: self.inner(x)[:, 0], inner=mlp())
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
    model = Over(lambda self, x: self.inner(x).float(), inner=inner)
    gradients = extract_gradients(model, torch.randn(4, 6).bfloat16(), "kl", "mean")
    assert {tensor.dtype for _, tensor in gradients.tensors()} == {gradients.dtype}
    assert {tensor.dtype for _, tensor in gradients.to(torch.zeros(1, dtype=torch.float64)).tensors()} == {
        torch.float64
    }


# --- bad input --------------------------------------------------------------------------------------------------


def refuse(match: str, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        extract_gradients(model, inputs, *args, **options)


PATTERNS = [
    ("0.wieght", r"params: .*'0\.wieght'.*near matches: .*0\.weight"),
    ("1.weigh", r"params: .*near matches: "),
    (["0.*", "body.*"], r"params: .*'body\.\*'.*near matches: "),
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
    model = Over(lambda self, x: self.first(x), first=nn.Linear(6, 3), inner=make()).train()
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
    model = Over(lambda self, x: self.first(x), first=nn.Linear(6, 3), inner=make()).train()
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
    model = Over(RANDOM[name], inner=nn.Linear(6, 6)).eval()
    state = torch.get_rng_state()
    refuse(r"model: .*random numbers", model, torch.randn(4, 2, 6, generator=torch.Generator()), reference="mean")
    assert torch.equal(torch.get_rng_state(), state)


def test_randomness_in_the_contrast_is_refused() -> None:
    """The contrasting pass of a pair is held to the same."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.dropout(self.inner(x), training=bool(x[0, 0] > 0))

    model = Over(forward, inner=nn.Linear(6, 6)).eval()
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
        r"model: expected a tensor or something with \.logits", Over(lambda self, x: output, w=weight(1)), torch.ones(2)
    )


def test_zero_rows_are_refused() -> None:
    """A batch without rows has no samples."""
    refuse("data: expected at least one sample", mlp(), torch.randn(0, 6))


def test_an_output_without_rows_is_refused() -> None:
    """A scalar output has no samples either."""
    refuse(
        "data: expected at least one sample", Over(lambda self, x: self.w.sum() * x.sum(), w=weight(2)), torch.ones(3)
    )


def test_parameters_without_entries_are_refused() -> None:
    """A parameter without entries has nothing to decompose; beside others it does not matter."""
    model = Over(lambda self, x: self.inner(x), inner=nn.Linear(6, 3), empty=nn.Parameter(torch.empty(0, 4)))
    refuse("params: ", model, torch.randn(4, 6), params="empty")
    assert list(extract_gradients(model, torch.randn(4, 6)).shapes) == ["inner.weight", "inner.bias"]


def test_parameters_the_output_does_not_depend_on_are_refused() -> None:
    """If the output depends on none of the chosen parameters, there is nothing to decompose."""
    refuse(
        r"params: .*none of c", Over(lambda self, x: x * self.w, w=weight(3), c=weight(2)), torch.ones(4, 3), params="c"
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


@pytest.mark.parametrize("value", ["KL", "mean", 3, None, ["kl"], {"kl": 1}], ids=str)
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
    model = Over(lambda self, x: self.inner(x)[:, 0], inner=mlp())
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
    model = Over(function, w=weight(VOCABULARY + 2, 3))
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
    model = Over(lambda self, x: (self.inner(x) * self.p).real, inner=nn.Linear(6, 6), p=p)
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
