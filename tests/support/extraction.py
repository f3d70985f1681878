"""Share small models, references and torch.func's gradients among the tests of extract_gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from helpers import assert_relative

TOLERANCE = 1e-10
VOCABULARY, WIDTH, LENGTH = 11, 4, 5


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


def mlp() -> nn.Sequential:
    """Make a network of three layers, 6 inputs to 3 outputs."""
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def tokens(rows: int = 3, length: int = LENGTH) -> Tensor:
    """Draw token ids [rows, length]."""
    return torch.randint(VOCABULARY, (rows, length))


def gpt2(tied: bool) -> nn.Module:
    """Make a GPT-2 of two layers, its head tied to the embedding or not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=WIDTH, n_layer=2, n_head=2, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return enlarged(GPT2LMHeadModel(config))


def llama(tied: bool) -> nn.Module:
    """Make a Llama of two layers with grouped keys and values, its head tied to the embedding or not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return enlarged(LlamaForCausalLM(config))


def enlarged(model: nn.Module) -> nn.Module:
    """Redraw all parameters at a standard deviation of 0.5: fresh weights are tiny, and fresh biases zero."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.double().eval()


LANGUAGE_MODELS = {"gpt2": gpt2, "llama": llama}


def logits(output: Any) -> Tensor:
    """Return a model's output as a tensor."""
    return getattr(output, "logits", output)


def kl(output: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) ‖ softmax(output)), written with torch's own."""
    return F.kl_div(output.log_softmax(-1), reference.log_softmax(-1), reduction="sum", log_target=True)


def truth(
    model: nn.Module,
    inputs: Tensor,
    references: Tensor,
    places: list[tuple[int, ...]],
    divergence: Callable[[Tensor, Tensor], Tensor] = kl,
) -> dict[str, Tensor]:
    """Compute every sample's gradient with torch.func, its row alone in the batch.

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
    """List every (row, position, ...) in the order of the samples."""
    return [tuple(place) for place in np.ndindex(rows, *positions)]


def assert_gradients(gradients: Any, expected: dict[str, Tensor]) -> None:
    """Compare every parameter's gradients and the squared norm, the latter before anything is multiplied out."""
    squared_norm = gradients.squared_norm()
    actual = gradients.materialize()
    for name in gradients.shapes:
        assert_relative(actual[name], expected[name], TOLERANCE)
    total = sum(expected[name].reshape(gradients.n_samples, -1).square().sum(1) for name in gradients.shapes)
    assert_relative(squared_norm, total, TOLERANCE)


def assert_same(actual: Any, expected: Any, where: str = "state") -> None:
    """Assert that two nested states are equal to the bit; a failure names the place."""
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
