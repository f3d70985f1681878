"""Compare the gradients of every layer of torch.nn with torch.func's, and check which rule or fallback made them."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from l3d.gradients import extract, rules
from l3d.gradients.explain import explain
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Dense, Rows

from layer_checks import Multiply, Net, check, indices, layer, scrambled, weight

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """How each parameter's gradients were computed: the kind of a rule's part, or the name of a fallback."""
    taken: dict[str, set[str]] = defaultdict(set)

    def spied(apply: rules.Rule) -> rules.Rule:
        def spy(use: Any, *args: Any) -> Any:
            part = apply(use, *args)
            if part is not None:
                taken[use.name].add(type(part).__name__)
            return part

        return spy

    for key, functions in rules.RULES.items():
        monkeypatch.setitem(rules.RULES, key, [spied(apply) for apply in functions])
    vector_jacobian_product, from_output = rules.vector_jacobian_product, Extractor._from_output

    def spied_vector_jacobian_product(use: Any, *args: Any) -> Any:
        taken[use.name].add("vector_jacobian_product")
        return vector_jacobian_product(use, *args)

    def spied_from_output(self: Extractor, output: Tensor, samples: Any, d_out: Tensor, names: list[str]) -> Any:
        for name in names:
            taken[name].add("from_output")
        return from_output(self, output, samples, d_out, names)

    monkeypatch.setattr(rules, "vector_jacobian_product", spied_vector_jacobian_product)
    monkeypatch.setattr(extract.Extractor, "_from_output", spied_from_output)
    return taken


# --- Linear -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("between", [(), (3,), (2, 3)], ids=["2-d", "3-d", "4-d"])
def test_linear(between: tuple[int, ...], bias: bool) -> None:
    """A Linear sums over every position between the batch and the features."""
    check(layer(nn.Linear(5, 4, bias=bias)), torch.randn(6, *between, 5))


@pytest.mark.parametrize("dims", [1, 2], ids=["vector", "matrix"])
def test_linear_without_a_batch_dimension(dims: int) -> None:
    """A model may drop the batch dimension of a single row."""
    check(Net(lambda self, x: self.a(x[0])[None], a=nn.Linear(5, 4)), torch.randn(1, *[3] * (dims - 1), 5))


def test_conv1d_of_gpt2() -> None:
    """Hugging Face's Conv1D stores its weight [I, O]."""
    from transformers.pytorch_utils import Conv1D

    check(layer(scrambled(Conv1D(4, 5))), torch.randn(6, 3, 5))


# --- convolutions -----------------------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "padding and stride that cut off the edge": {"padding": 2, "stride": 3},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": 2},
    "dilation": {"dilation": 2},
    "same, dilation": {"padding": "same", "dilation": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
    "depthwise, two each": {"groups": 4, "out_channels": 8, "bias": False},
    "one pixel": {"kernel_size": 1},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "everything": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "padding_mode": "circular"},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolution(dims: int, options: dict[str, Any]) -> None:
    """A convolution sums over the output's pixels, each group by itself, whatever its stride, padding or dilation."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    module = kind(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options})
    check(layer(module), torch.randn(3, 4, *(7, 6, 5)[-dims:]))


def test_convolution_of_unequal_sides() -> None:
    """Kernel, stride, padding and dilation may differ per side."""
    check(layer(nn.Conv2d(2, 3, (3, 2), (1, 2), (2, 0), (1, 3))), torch.randn(4, 2, 6, 9))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "output_padding": 1}, {"groups": 2, "dilation": 2}])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolution(dims: int, options: dict[str, int], paths: dict[str, set[str]]) -> None:
    """A transposed convolution's weight has no rule and is pulled back; it is exact."""
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    check(layer(kind(4, 6, 2, **options)), torch.randn(3, 4, *(4, 3, 3)[-dims:]))
    assert paths["layer.weight"] == {"vector_jacobian_product"}


# --- embeddings, norms, attention, recurrence -------------------------------------------------------------------


def attention(**options: Any) -> nn.Module:
    """Self-attention, or attention to a fixed projection of x where keys and values have widths of their own."""

    def forward(self: Any, x: Tensor) -> Tensor:
        keys, values = (x @ self.to_keys, x @ self.to_values) if "kdim" in options else (x, x)
        if not options["batch_first"]:
            x, keys, values = (t.transpose(0, 1) for t in (x, keys, values))
        y = self.a(x, keys, values)[0]
        return y if options["batch_first"] else y.transpose(0, 1)

    module = scrambled(nn.MultiheadAttention(6, 2, **options))
    return Net(forward, a=module, to_keys=torch.randn(6, 4), to_values=torch.randn(6, 3))


def llama_norm() -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(6).double()


def transformer_layer(batch_first: bool, norm_first: bool) -> nn.Module:
    module = nn.TransformerEncoderLayer(6, 2, 8, batch_first=batch_first, norm_first=norm_first)
    if batch_first:
        return layer(scrambled(module))
    return Net(lambda self, x: self.layer(x.transpose(0, 1)).transpose(0, 1), layer=scrambled(module))


def recurrent(kind: Any, **options: Any) -> nn.Module:
    return Net(lambda self, x: self.layer(x)[0], layer=kind(6, 4, **options))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: layer(scrambled(nn.LayerNorm(6))), (4, 3, 6)),
    "LayerNorm, 2-d input": (lambda: layer(scrambled(nn.LayerNorm(6))), (4, 6)),
    "LayerNorm over two dimensions": (lambda: layer(scrambled(nn.LayerNorm([3, 6]))), (4, 2, 3, 6)),
    "LayerNorm over all but the batch": (lambda: layer(scrambled(nn.LayerNorm([3, 6]))), (4, 3, 6)),
    "LayerNorm without bias": (lambda: layer(scrambled(nn.LayerNorm(6, bias=False))), (4, 3, 6)),
    "GroupNorm": (lambda: layer(scrambled(nn.GroupNorm(2, 6))), (4, 6, 3, 2)),
    "GroupNorm of vectors": (lambda: layer(scrambled(nn.GroupNorm(2, 6))), (4, 6)),
    "InstanceNorm1d": (lambda: layer(scrambled(nn.InstanceNorm1d(6, affine=True))), (4, 6, 5)),
    "InstanceNorm2d": (lambda: layer(scrambled(nn.InstanceNorm2d(6, affine=True))), (4, 6, 3, 2)),
    "InstanceNorm with running statistics": (
        lambda: layer(scrambled(nn.InstanceNorm1d(6, affine=True, track_running_stats=True))),
        (4, 6, 5),
    ),
    "RMSNorm": (lambda: layer(scrambled(nn.RMSNorm(6))), (4, 3, 6)),
    "RMSNorm over two dimensions": (lambda: layer(scrambled(nn.RMSNorm([3, 6]))), (4, 3, 6)),
    "Llama's RMSNorm": (lambda: layer(scrambled(llama_norm())), (4, 3, 6)),
    "BatchNorm1d": (lambda: layer(scrambled(nn.BatchNorm1d(6))), (4, 6)),
    "BatchNorm1d of sequences": (lambda: layer(scrambled(nn.BatchNorm1d(6))), (4, 6, 3)),
    "BatchNorm2d": (lambda: layer(scrambled(nn.BatchNorm2d(6))), (4, 6, 3, 2)),
    "attention": (lambda: attention(batch_first=True), (4, 3, 6)),
    "attention without biases": (lambda: attention(batch_first=True, bias=False), (4, 3, 6)),
    "attention with bias_kv": (lambda: attention(batch_first=True, add_bias_kv=True), (4, 3, 6)),
    "attention, sequence first": (lambda: attention(batch_first=False), (4, 3, 6)),
    "cross-attention": (lambda: attention(batch_first=True, kdim=4, vdim=3), (4, 3, 6)),
    "cross-attention, sequence first": (lambda: attention(batch_first=False, kdim=4, vdim=3), (4, 3, 6)),
    "transformer": (lambda: transformer_layer(True, False), (4, 3, 6)),
    "transformer, norm first": (lambda: transformer_layer(True, True), (4, 3, 6)),
    "transformer, sequence first": (lambda: transformer_layer(False, False), (4, 3, 6)),
    "GRU": (lambda: recurrent(nn.GRU, batch_first=True), (4, 3, 6)),
    "GRU, two layers, both ways": (
        lambda: recurrent(nn.GRU, batch_first=True, num_layers=2, bidirectional=True),
        (4, 3, 6),
    ),
    "LSTM": (lambda: recurrent(nn.LSTM, batch_first=True), (4, 3, 6)),
    "LSTM, projected": (lambda: recurrent(nn.LSTM, batch_first=True, proj_size=2), (4, 3, 6)),
    "Elman RNN": (lambda: recurrent(nn.RNN, batch_first=True), (4, 3, 6)),
    "GRU cell": (lambda: Net(lambda self, x: self.a(x[:, 1], self.a(x[:, 0])), a=nn.GRUCell(6, 6)), (4, 2, 6)),
    "PReLU": (lambda: layer(nn.PReLU(6)), (4, 6, 3)),
    "Bilinear": (lambda: Net(lambda self, x: self.a(x, x.sin()), a=nn.Bilinear(6, 6, 3)), (4, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    """Every layer of torch.nn is exact."""
    factory, shape = LAYERS[name]
    check(factory(), torch.randn(shape))


def test_lstm_in_float32_is_exact_from_the_output(paths: dict[str, set[str]]) -> None:
    """A layer fused into one node with several outputs is differentiated from the model's output."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no fused LSTM on a CPU")
    torch.set_default_dtype(torch.float32)
    check(recurrent(nn.LSTM, batch_first=True), torch.randn(4, 3, 6), tolerance=1e-5)
    assert paths["layer.weight_ih_l0"] == {"from_output"}


@pytest.mark.parametrize("padding", [None, 2, -2], ids=["no padding", "padding", "padding from the end"])
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3)], ids=["1-d", "2-d", "3-d"])
def test_embedding(shape: tuple[int, ...], padding: int | None) -> None:
    """An embedding gathers repeated indices, and its padding row gets nothing."""
    module = nn.Embedding(5, 3, padding_idx=padding)
    nn.init.normal_(module.weight)
    inputs = indices(5, *shape)
    inputs.flatten()[:4] = torch.tensor([2, 3, 2, 3])
    gradients = check(layer(module), inputs)
    if padding is not None:
        assert not gradients.materialize()["layer.weight"][:, padding].any()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode: str, paths: dict[str, set[str]]) -> None:
    """An EmbeddingBag has no rule: it is pulled back, and exact."""
    check(layer(nn.EmbeddingBag(7, 3, mode=mode)), indices(7, 4, 5))
    assert paths["layer.weight"] == {"vector_jacobian_product"}


# --- which way each gradient came -------------------------------------------------------------------------------

PATHS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], dict[str, str]]] = {
    "Linear": (
        lambda: layer(nn.Linear(9, 8)),
        lambda: torch.randn(5, 9),
        {"layer.weight": "Rows", "layer.bias": "Dense"},
    ),
    "convolution": (
        lambda: layer(nn.Conv2d(4, 6, 3)),
        lambda: torch.randn(3, 4, 5, 5),
        {"layer.weight": "Rows", "layer.bias": "Dense"},
    ),
    "grouped convolution": (
        lambda: layer(nn.Conv2d(4, 6, 3, groups=2)),
        lambda: torch.randn(3, 4, 5, 5),
        {"layer.weight": "Dense"},
    ),
    "embedding": (lambda: layer(nn.Embedding(7, 3)), lambda: indices(7, 5, 2), {"layer.weight": "Rows"}),
    "attention": (
        lambda: attention(batch_first=True),
        lambda: torch.randn(4, 3, 6),
        {"a.in_proj_weight": "Rows", "a.out_proj.weight": "Rows"},
    ),
    "LayerNorm": (
        lambda: layer(nn.LayerNorm(6)),
        lambda: torch.randn(4, 3, 6),
        {"layer.weight": "Dense", "layer.bias": "Dense"},
    ),
    "GroupNorm": (lambda: layer(nn.GroupNorm(2, 6)), lambda: torch.randn(4, 6, 3), {"layer.weight": "Dense"}),
    "BatchNorm": (lambda: layer(nn.BatchNorm1d(6)), lambda: torch.randn(4, 6, 3), {"layer.weight": "Dense"}),
    "Llama's RMSNorm": (lambda: layer(llama_norm()), lambda: torch.randn(4, 3, 6), {"layer.weight": "Dense"}),
    "a rule that declines": (
        lambda: Net(lambda self, x: F.linear(x, self.w[:4], self.b[:4]), w=weight(8, 6), b=weight(8)),
        lambda: torch.randn(5, 6),
        {"w": "vector_jacobian_product", "b": "vector_jacobian_product"},
    ),
    "a layer without a rule": (
        lambda: layer(nn.PReLU(6)),
        lambda: torch.randn(4, 6),
        {"layer.weight": "vector_jacobian_product"},
    ),
    "weight on the left": (
        lambda: Net(lambda self, x: (self.w @ x.T).T, w=weight(4, 6)),
        lambda: torch.randn(5, 6),
        {"w": "vector_jacobian_product"},
    ),
    "an order no layout describes": (
        lambda: Net(lambda self, x: self.a(x).flip(0), a=nn.Linear(6, 4)),
        lambda: torch.randn(5, 6),
        {"a.weight": "from_output", "a.bias": "from_output"},
    ),
    "a custom function": (
        lambda: Net(lambda self, x: Multiply.apply(self.a(x), self.w), a=nn.Linear(6, 6), w=weight(6, 4)),
        lambda: torch.randn(5, 6),
        {"a.weight": "from_output", "w": "from_output"},
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_path(name: str, paths: dict[str, set[str]]) -> None:
    """Each layer takes its rule, and each case without one takes its fallback; all are exact."""
    factory, make, expected = PATHS[name]
    check(factory(), make(), whole_batch=True)
    assert {parameter: paths[parameter] for parameter in expected} == {k: {v} for k, v in expected.items()}
    explained = explain(factory().eval(), make())
    slow = {use.parameter for use in explained.slow}
    assert {name: name in slow for name in expected} == {k: v not in ("Rows", "Dense") for k, v in expected.items()}
    assert all(bool(use.rule) != bool(use.why) for use in explained.uses)


@pytest.mark.parametrize("name", LAYERS)
def test_fallbacks_agree_with_rules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any rule every layer is pulled back or differentiated from the output, to the same gradients."""
    factory, shape = LAYERS[name]
    monkeypatch.setattr(rules, "RULES", {})
    gradients = check(factory(), torch.randn(shape))
    assert all(isinstance(part, Dense) for parts in gradients.parts.values() for part in parts)


class Identity(torch.autograd.Function):
    """Nothing, as a custom function: below it the graph may hide anything."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None: ...

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy


@pytest.mark.parametrize("name", LAYERS)
def test_everything_from_the_output_agrees(name: str, paths: dict[str, set[str]]) -> None:
    """Where the graph may hide a use, every gradient comes from the output, and is the same."""
    factory, shape = LAYERS[name]
    net = Net(lambda self, x: Identity.apply(self.inner(x)), inner=factory())
    gradients = check(net, torch.randn(shape))
    assert dict(paths) == {name: {"from_output"} for name in gradients.shapes}


def test_large_weights_stay_in_factors() -> None:
    """A Linear's gradient stays in rows; a convolution's whose factors are larger is multiplied out."""
    linear = check(layer(nn.Linear(9, 8)), torch.randn(5, 2, 9)).parts["layer.weight"]
    assert [type(part) for part in linear] == [Rows]
    convolution = check(layer(nn.Conv2d(2, 3, 2)), torch.randn(3, 2, 9, 9)).parts["layer.weight"]
    assert [type(part) for part in convolution] == [Dense]


def test_parametrized_weights_are_named_by_their_originals() -> None:
    """A parametrized weight is decomposed in its own coordinates: what is stored and trained."""
    module = nn.Linear(6, 4)

    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    parametrize.register_parametrization(module, "weight", Doubled())
    gradients = check(layer(module), torch.randn(5, 6))
    assert sorted(gradients.shapes) == ["layer.bias", "layer.parametrizations.weight.original"]
