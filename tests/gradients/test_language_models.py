"""Compare per-sample gradients of Hugging Face language models with torch.func's; each takes its fast path."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from l3d.gradients import extract, rules
from l3d.gradients.extract import Extractor, extract_gradients
from l3d.gradients.factors import Rows
from l3d.gradients.graph import layout

from helpers import assert_relative

transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH, WINDOW = 13, 6, 3
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 16,
}  # fmt: skip
GPT = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
GROUPED = {"num_key_value_heads": 2, **COMMON}  # two heads of queries share keys and values
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0, **GROUPED}

# family: (class name, its configuration)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, **GPT}),
    "GPT-Neo, global and local": (
        "GPTNeo",
        {
            "hidden_size": 8, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW, "max_position_embeddings": 16, **GPT,
        },
    ),
    "Llama": ("Llama", GROUPED),
    "Qwen2, sliding windows": ("Qwen2", SLIDING),
    "Qwen3, sliding windows": ("Qwen3", {"head_dim": 4, **SLIDING}),
    "Mistral, sliding windows": ("Mistral", {"sliding_window": WINDOW, **GROUPED}),
    "GPT-NeoX (Pythia)": ("GPTNeoX", COMMON),
}  # fmt: skip


def build(family: str, tied: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a tiny model of a family, with random weights of a size that shows."""
    name, settings = FAMILIES[family]
    config_class = getattr(transformers, f"{name}Config")
    model_class = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(config_class(tie_word_embeddings=tied, **settings))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    model.config.use_cache = False
    return model.to(dtype).eval()


def layers_of(family: str) -> str:
    """Name the list of a family's layers."""
    names = {"GPT2": "transformer.h", "GPTNeo": "transformer.h", "GPTNeoX": "gpt_neox.layers"}
    return names.get(FAMILIES[family][0], "model.layers")


def batch(*masked: tuple[int, int]) -> dict[str, Tensor]:
    """Make rows of ids, row i with masked[i] = (first, last + 1) position that is no padding."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(len(masked), LENGTH, dtype=torch.int64)
    for row, (start, stop) in zip(mask, masked, strict=True):
        row[start:stop] = 1
    return {"input_ids": torch.randint(VOCABULARY, mask.shape, generator=generator), "attention_mask": mask}


def truth(model: nn.Module, inputs: dict[str, Tensor], references: Tensor) -> dict[str, Tensor]:
    """torch.func's gradients of KL at every position that is no padding, each row alone in its batch."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def divergence(parameters: dict[str, Tensor], row: int, position: int) -> Tensor:
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        log_q = functional_call(model, parameters, (), alone).logits[0, position].log_softmax(-1)
        log_p = references[row, position].log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    grads = [torch.func.grad(divergence)(parameters, *place) for place in inputs["attention_mask"].nonzero().tolist()]
    return {name: torch.stack([grad[name] for grad in grads]) for name in parameters}


@pytest.fixture
def slow_paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of whatever took a way other than a rule, the graph's own layout and the head's shortcut."""
    taken: list[str] = []

    def spy(home: Any, name: str, tell: Callable[..., Any]) -> None:
        original = getattr(home, name)

        def spied(*args: Any) -> Any:
            result = original(*args)
            taken.extend(tell(result, *args))
            return result

        monkeypatch.setattr(home, name, spied)

    spy(rules, "vector_jacobian_product", lambda _, use, *rest: [f"pulled back: {use.name}"])
    spy(Extractor, "_from_output", lambda _, self, output, samples, d_out, names: [f"from output: {n}" for n in names])
    spy(layout, "prove_layouts", lambda *_: ["probed"])
    spy(extract, "positionwise_head", lambda found, *_: [] if found else ["vocabulary in every backward pass"])
    return taken


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family(family: str, tied: bool, slow_paths: list[str]) -> None:
    """Attention, MLP, norms, embeddings, tied heads: all equal torch.func, padding left out, and all by rules."""
    model = build(family, tied)
    inputs = batch((0, LENGTH), (0, 4))  # the second row ends early
    references = torch.randn(2, LENGTH, VOCABULARY, dtype=torch.float64)
    gradients = extract_gradients(model, inputs, "kl", references)
    expected = truth(model, inputs, references)
    assert gradients.n_samples == LENGTH + 4
    assert set(gradients.shapes) == set(expected)
    total = sum(grad.flatten(1).square().sum(1) for grad in expected.values())
    assert_relative(gradients.squared_norm(), total, 1e-10)
    for name, grad in gradients.materialize().items():
        assert_relative(grad, expected[name], 1e-9)
    assert slow_paths == []


@pytest.mark.parametrize("positions", ["all", 2, "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_mlp_goes_backward_once(family: str, positions: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every family, decomposing a first layer's attention: one pass above the last attention, exact gradients.

    But in GPT-NeoX, whose MLP lies beside the attention and not above it.
    """
    monkeypatch.setattr(extract, "PASSES_BYTES", {})  # a pass each, to be counted
    model = build(family)
    stem = layers_of(family)
    passes: dict[int, int] = {0: 0, 1: 0}

    def count(layer: int) -> Callable[..., None]:
        def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.grad_fn is not None:
                output.grad_fn.register_prehook(lambda _: passes.update({layer: passes[layer] + 1}))

        return seen

    for layer in passes:
        model.get_submodule(f"{stem}.{layer}.mlp").register_forward_hook(count(layer))
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    references = torch.randn(2, LENGTH, VOCABULARY, dtype=torch.float64)
    params = f"{stem}.0.*att*.weight"
    chosen = extract_gradients(
        model, tokens, "kl", references, params, positions, torch.Generator().manual_seed(2)
    ).materialize()
    each = {"all": LENGTH, 2: 2, "last": 1}[positions]
    assert passes == {0: each, 1: each if "NeoX" in family else 1}
    if positions == "all":
        expected = truth(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, references)
        for name, grad in chosen.items():
            assert_relative(grad, expected[name], 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_go_together(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every family: the passes of several positions at once give what one after another gives."""
    model = build(family)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    calls: list[bool] = []
    grad = torch.autograd.grad

    def counted(*given: Any, is_grads_batched: bool = False, **options: Any) -> Any:
        calls.append(is_grads_batched)
        return grad(*given, is_grads_batched=is_grads_batched, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    found = {}
    for room in (0, 1 << 17, 1 << 28):
        monkeypatch.setattr(extract, "PASSES_BYTES", {"cpu": room})
        calls.clear()
        found[room] = extract_gradients(model, tokens, "kl", "uniform", f"{layers_of(family)}.0.*.weight").materialize()
        assert any(calls) == bool(room) or room == 1 << 17
    for name, expected in found[0].items():
        for room in (1 << 17, 1 << 28):
            assert_relative(found[room][name], expected, 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_of_one_layer_in_bfloat16(family: str, slow_paths: list[str]) -> None:
    """One layer's matrices come by the same rules in bfloat16, to its accuracy."""
    layers = layers_of(family)
    low = build(family, dtype=torch.bfloat16)
    exact = build(family).bfloat16().double()  # the same rounded weights
    inputs = batch((0, LENGTH), (0, LENGTH))["input_ids"]
    params = [f"{layers}.1.*att*.weight", f"{layers}.1.mlp.*.weight"]
    references = torch.randn(2, LENGTH, VOCABULARY)
    found, truth = (
        extract_gradients(model, inputs, "kl", references.double(), params=[*params]) for model in (low, exact)
    )
    assert found.dtype == torch.bfloat16
    matrices = {name for name, shape in found.shapes.items() if len(shape) == 2}
    assert len(matrices) >= 4
    for name in matrices:
        expected = truth.materialize()[name]
        error = (found.materialize()[name].double() - expected).norm() / expected.norm()
        assert error < 0.1, f"{name}: {error:.3f}"
    assert slow_paths == []


def test_left_padding() -> None:
    """Padding in front is left out too, where the model's attention and positions can tell it."""
    model = build("Llama")
    inputs = batch((2, LENGTH), (0, LENGTH))
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    references = torch.randn(2, LENGTH, VOCABULARY, dtype=torch.float64)
    grads = extract_gradients(model, inputs, "kl", references).materialize()
    alone = {name: value[:1, 2:] for name, value in inputs.items()}
    short = extract_gradients(model, alone, "kl", references[:1, 2:]).materialize()
    for name, grad in grads.items():
        assert_relative(grad[:4], short[name], 1e-9)


# --- which positions are samples --------------------------------------------------------------------------------


def test_padding_is_no_reference() -> None:
    """Drawn references, and the mean, are of positions that are no padding, whatever stands in the padding."""
    model, inputs = build("GPT-2"), batch((0, 3), (0, LENGTH))
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 3:] += 1
    other["input_ids"] %= VOCABULARY
    for reference in ("sample", "mean"):
        one, two = (
            extract_gradients(model, each, "kl", reference, "*attn*", generator=torch.Generator().manual_seed(0))
            for each in (inputs, other)
        )
        assert one.n_samples == 3 + LENGTH
        for name, grad in one.materialize().items():
            assert_relative(grad, two.materialize()[name], 1e-12)


@pytest.mark.parametrize("positions", ["last", 2, 5])
def test_chosen_positions_are_no_padding(positions: str | int) -> None:
    """The last position is the last that counts; of rows shorter than the draw every position is taken."""
    model, inputs = build("GPT-2"), batch((0, 3), (1, 5), (0, 2))
    name, references = "transformer.h.0.attn.c_proj.weight", torch.randn(3, LENGTH, VOCABULARY, dtype=torch.float64)
    every = extract_gradients(model, inputs, "kl", references, name).matrix(name).flatten(1)
    generator = torch.Generator().manual_seed(0)
    found = extract_gradients(model, inputs, "kl", references, name, positions, generator=generator)
    distances = torch.cdist(found.matrix(name).flatten(1), every)
    assert distances.amin(1).max() < 1e-10  # each is one of those that are no padding
    places = distances.argmin(1).tolist()  # among the 3 + 4 + 2
    if positions == "last":
        assert places == [2, 6, 8]
    else:
        assert sorted(set(places)) == places
        assert len(places) == sum(min(int(positions), length) for length in (3, 4, 2))


def test_a_mask_of_ones_changes_nothing() -> None:
    """Rows without padding share their factors, as they do without a mask."""
    model, inputs = build("Llama"), batch((0, LENGTH), (0, LENGTH))
    masked, plain = (
        extract_gradients(model, each, "kl", "uniform", "*embed_tokens*") for each in (inputs, inputs["input_ids"])
    )
    (part,), (other,) = masked.parts.popitem()[1], plain.parts.popitem()[1]
    assert isinstance(part, Rows)
    assert isinstance(other, Rows)
    assert part.x.shape[0] == 2
    assert torch.equal(part.dy, other.dy)


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.zeros(2, LENGTH), "every position is padding"),
        (
            torch.ones(2, 1, LENGTH, LENGTH),
            r"with 0 at padding, got \[2, 1, 6, 6\]",
        ),
    ],
)
def test_masks_that_tell_no_samples_are_refused(mask: Tensor, message: str) -> None:
    """A mask that hides everything, or that is one of attention and not of padding, is refused by name."""
    inputs = batch((0, LENGTH), (0, LENGTH)) | {"attention_mask": mask}
    with pytest.raises(ValueError, match=message):
        extract_gradients(build("Llama"), inputs, "kl")


def test_pairs_of_different_padding_are_refused() -> None:
    """A sample whose contrast is padding has nothing to be compared with."""
    pair = (batch((0, 4)), batch((0, 5)))
    with pytest.raises(ValueError, match="expected the contrast to be padded at the same positions as the input"):
        extract_gradients(build("Llama"), pair, "kl", "pair")
    same = (batch((0, 4)), {**batch((0, 4)), "input_ids": torch.zeros(1, LENGTH, dtype=torch.int64)})
    assert extract_gradients(build("Llama"), same, "kl", "pair").n_samples == 4
