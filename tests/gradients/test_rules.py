"""Every way a model can use a parameter gives the gradients that torch.func gives, one row at a time, in float64."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from l3d.gradients import extract, rules
from l3d.gradients.extract import Extractor
from l3d.gradients.factors import Dense, Gradients, Rows

from helpers import assert_relative

TOLERANCE = 1e-10


pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """A model made of a function of (self, x) and the parameters, buffers and modules it names."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def layer(module: nn.Module) -> Net:
    """A model that is one layer, followed by a sine so that what comes back differs everywhere."""
    return Net(lambda self, x: torch.sin(self.layer(x)), layer=module)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def scrambled(module: nn.Module) -> nn.Module:
    """Give every parameter and floating buffer random values: ones and zeros hide mistakes."""
    for p in module.parameters():
        nn.init.normal_(p)
    for name, b in module.named_buffers():
        if b.is_floating_point():
            b.copy_(torch.rand_like(b) + 0.5 if "var" in name else torch.randn_like(b))
    return module


def indices(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def mean_square(output: Tensor, reference: Tensor) -> Tensor:
    return (output - reference).square().mean()


def truth(model: nn.Module, inputs: Tensor, references: Tensor, whole_batch: bool = False) -> dict[str, Tensor]:
    """torch.func's gradient of each sample's divergence, the row alone in its batch (or in the whole batch)."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], row: int) -> Tensor:
        batch, place = (inputs, row) if whole_batch else (inputs[row : row + 1], 0)
        return mean_square(functional_call(model, params, (batch,))[place], references[row])

    grads = [torch.func.grad(loss)(params, row) for row in range(len(references))]
    return {name: torch.stack([grad[name] for grad in grads]) for name in params}


def check(
    model: nn.Module,
    inputs: Tensor,
    whole_batch: bool = False,
    twin: nn.Module | None = None,
    extractor: Extractor | None = None,
    zero: tuple[str, ...] = (),
    tolerance: float = TOLERANCE,
) -> Gradients:
    """Hold the extracted gradients and their squared norm against the truth.

    Args:
        whole_batch: rows depend on one another, so the truth needs the whole batch.
        twin: a model with the same parameters for torch.func, where it cannot run this one.
        extractor: one that has seen other batches.
        zero: the parameters whose gradient is exactly zero; every other's must not be.
    """
    model.eval()
    output = model(inputs).detach()
    references = torch.randn_like(output)
    if extractor is None:
        extractor = Extractor(model, "mse", references)
    extractor.reference = references
    gradients = extractor(inputs)
    squared_norm = gradients.squared_norm()  # before anything is multiplied out
    actual = gradients.materialize()
    if twin is not None:
        twin.load_state_dict(model.state_dict())
        twin.eval()
    expected = truth(twin or model, inputs, references, whole_batch)
    assert list(actual) == list(expected)
    for name, grad in expected.items():
        assert bool(grad.any()) == (name not in zero), f"{name}: a gradient that cannot tell right from wrong"
        assert_relative(actual[name], grad, tolerance)
    total = sum(grad.reshape(len(references), -1).square().sum(1) for grad in expected.values())
    assert_relative(squared_norm, total, tolerance)
    return gradients


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Which way each parameter's gradients were made: the kind of a rule's part, or the name of a fallback."""
    taken: dict[str, set[str]] = defaultdict(set)

    def spied(apply: rules.Rule) -> rules.Rule:
        def spy(use: Any, *args: Any) -> Any:
            part = apply(use, *args)
            if part is not None:
                taken[use.name].add(type(part).__name__)
            return part

        return spy

    for key, apply in rules.RULES.items():
        monkeypatch.setitem(rules.RULES, key, spied(apply))
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


# --- weights used in other ways ---------------------------------------------------------------------------------


class Multiply(torch.autograd.Function):
    """x @ w as a custom function, whose inside the graph does not show."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return dy @ w.mT, (x.mT @ dy).sum_to_size(w.shape)


def packed(self: Any, x: Tensor) -> Tensor:
    """Three Linears packed into one weight, cut by chunk."""
    q, k, v = (F.linear(x, w, b) for w, b in zip(self.w.chunk(3), self.b.chunk(3), strict=True))
    return torch.sin(q) * k + v


def embedded_and_decoded(self: Any, x: Tensor) -> Tensor:
    """One table that embeds and decodes."""
    return F.linear(torch.tanh(self.a(self.table(x))), self.table.weight)


def both_orientations(self: Any, x: Tensor) -> Tensor:
    """A Linear followed by its own transpose, and by itself again."""
    return self.a(torch.tanh(F.linear(torch.sin(self.a(x)), self.a.weight.T)))


def class_token(self: Any, x: Tensor) -> Tensor:
    return self.a(torch.cat([self.token.expand(len(x), -1, -1), x], 1)).cumsum(1).sin()


USES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "functional linear": (
        lambda: Net(lambda self, x: F.linear(x, self.w, self.b), w=weight(4, 6), b=weight(4)),
        (5, 6),
    ),
    "functional conv": (
        lambda: Net(lambda self, x: F.conv1d(x, self.w.view(4, 3, 2), self.b), w=weight(4, 6), b=weight(4)),
        (5, 3, 6),
    ),
    "a pixel convolution as a linear": (
        lambda: Net(lambda self, x: F.linear(x, self.w.flatten(1)), w=weight(4, 6, 1, 1)),
        (5, 3, 6),
    ),
    "functional layer_norm of slices": (
        lambda: Net(lambda self, x: F.layer_norm(x, (6,), self.w[:6], self.w[2:]), w=weight(8)),
        (5, 3, 6),
    ),
    "functional group_norm of slices": (
        lambda: Net(lambda self, x: F.group_norm(x, 2, self.w[:6], self.w[2:]), w=weight(8)),
        (5, 6, 3),
    ),
    "functional batch_norm of slices": (
        lambda: Net(
            lambda self, x: F.batch_norm(x, self.mean, self.var, self.w[:6], self.w[2:]),
            w=weight(8),
            mean=torch.randn(6),
            var=torch.rand(6) + 0.5,
        ),
        (5, 6, 3),
    ),
    "functional conv of slices": (
        lambda: Net(lambda self, x: F.conv1d(x, self.w[:2], self.b[1:]), w=weight(3, 6, 2), b=weight(3)),
        (5, 6, 4),
    ),
    "matmul": (lambda: Net(lambda self, x: x @ self.w, w=weight(6, 4)), (5, 3, 6)),
    "matmul, weight on the left": (lambda: Net(lambda self, x: self.w @ x, w=weight(4, 3)), (5, 3, 6)),
    "mm, weight on the left": (lambda: Net(lambda self, x: (self.w @ x.T).T, w=weight(4, 6)), (5, 6)),
    "mv": (lambda: Net(lambda self, x: x @ self.w, w=weight(6)), (5, 6)),
    "mv, row by row": (lambda: Net(lambda self, x: torch.stack([self.w @ row for row in x]), w=weight(4, 6)), (5, 6)),
    "addmm": (
        lambda: Net(lambda self, x: torch.addmm(self.b, x, self.w, alpha=0.7, beta=1.3), w=weight(6, 4), b=weight(4)),
        (5, 6),
    ),
    "addmm with a bias to broadcast": (
        lambda: Net(
            lambda self, x: torch.addmm(self.b, x, self.w, beta=2) + torch.addmm(self.c, x, self.w, alpha=2),
            w=weight(6, 4),
            b=weight(1, 4),
            c=weight(1),
        ),
        (5, 6),
    ),
    "addmm, weight on the left": (
        lambda: Net(lambda self, x: torch.addmm(self.b[:, None], self.w, x.T).T, w=weight(4, 6), b=weight(4)),
        (5, 6),
    ),
    "bmm": (lambda: Net(lambda self, x: torch.bmm(x, self.w.expand(len(x), -1, -1)), w=weight(6, 4)), (5, 3, 6)),
    "bmm, weight on the left": (
        lambda: Net(lambda self, x: torch.bmm(self.w.expand(len(x), -1, -1), x), w=weight(4, 3)),
        (5, 3, 6),
    ),
    "baddbmm": (
        lambda: Net(
            lambda self, x: torch.baddbmm(self.b, x, self.w.expand(len(x), -1, -1), beta=2, alpha=0.5),
            w=weight(6, 4),
            b=weight(1, 3, 4),
        ),
        (5, 3, 6),
    ),
    "einsum": (lambda: Net(lambda self, x: torch.einsum("bti,oi->bto", x, self.w), w=weight(4, 6)), (5, 3, 6)),
    "einsum, weight first": (
        lambda: Net(lambda self, x: torch.einsum("oi,bti->bot", self.w, x), w=weight(4, 6)),
        (5, 3, 6),
    ),
    "einsum, a weight per position": (
        lambda: Net(lambda self, x: torch.einsum("bti,tio->bto", x, self.w), w=weight(3, 6, 4)),
        (5, 3, 6),
    ),
    "einsum over positions": (
        lambda: Net(lambda self, x: torch.einsum("bti,ts->bsi", x, self.w.tril()), w=weight(3, 3)),
        (5, 3, 6),
    ),
    "a linear tied to its own transpose": (lambda: Net(both_orientations, a=nn.Linear(6, 6)), (5, 3, 6)),
    "transposed three times": (lambda: Net(lambda self, x: x @ self.w.T.T.T, w=weight(4, 6)), (5, 6)),
    "called several times": (
        lambda: Net(lambda self, x: self.a(torch.sin(self.a(torch.sin(self.a(x))))), a=nn.Linear(6, 6)),
        (5, 3, 6),
    ),
    "called on parts of a row": (
        lambda: Net(lambda self, x: self.a(x[:, 0]) * self.a(x[:, 1:]).sum(1), a=nn.Linear(6, 4)),
        (5, 3, 6),
    ),
    "called on each row": (
        lambda: Net(lambda self, x: torch.stack([self.a(row) for row in x]), a=nn.Linear(6, 4)),
        (5, 3, 6),
    ),
    "a packed weight, chunked": (lambda: Net(packed, w=weight(12, 6), b=weight(12)), (5, 3, 6)),
    "a packed weight, split, unbound and indexed": (
        lambda: Net(
            lambda self, x: F.linear(x, self.w.split([1, 3])[1]) * self.v.unbind(0)[1] + self.v[0],
            w=weight(4, 6),
            v=weight(2, 3),
        ),
        (5, 6),
    ),
    "rows of a weight, indexed by the input": (
        lambda: Net(
            lambda self, x: self.w[(x > 0).long()] * self.w.index_select(0, torch.arange(6) % 2), w=weight(2, 3)
        ),
        (5, 6),
    ),
    "gather": (
        lambda: Net(lambda self, x: torch.take_along_dim(self.w, (x > 0).long(), 0), w=weight(2, 6)),
        (5, 6),
    ),
    "weight_norm": (
        lambda: Net(lambda self, x: self.a(x), a=parametrizations.weight_norm(nn.Linear(6, 4))),
        (5, 3, 6),
    ),
    "orthogonal": (lambda: layer(parametrizations.orthogonal(nn.Linear(6, 4))), (5, 3, 6)),
    "spectral_norm": (lambda: layer(parametrizations.spectral_norm(nn.Linear(6, 4))), (5, 3, 6)),
    "a low-rank update": (
        lambda: Net(lambda self, x: x @ (self.w + self.a @ self.b), w=weight(6, 4), a=weight(6, 2), b=weight(2, 4)),
        (5, 3, 6),
    ),
    "a product of weights": (
        lambda: Net(lambda self, x: x @ (self.w * self.w) @ (self.w @ self.v), w=weight(6, 6), v=weight(6, 4)),
        (5, 3, 6),
    ),
    "a custom function": (
        lambda: Net(lambda self, x: torch.sin(Multiply.apply(self.a(x), self.w)), a=nn.Linear(6, 6), w=weight(6, 4)),
        (5, 6),
    ),
    "vmap in the model": (
        lambda: Net(lambda self, x: torch.vmap(lambda row: self.a(row) * self.w)(x), a=nn.Linear(6, 6), w=weight(6)),
        (5, 3, 6),
    ),
    "a class token": (lambda: Net(class_token, a=nn.Linear(6, 4), token=weight(1, 1, 6)), (5, 3, 6)),
    "learned positions": (
        lambda: Net(lambda self, x: torch.sin(x + self.p[:, : x.shape[1]]).cumsum(1), p=weight(1, 8, 6)),
        (5, 3, 6),
    ),
    "learned positions of an embedding": (
        lambda: Net(lambda self, x: (x + self.p(torch.arange(x.shape[1]))).sin().cumsum(1), p=nn.Embedding(8, 6)),
        (5, 3, 6),
    ),
    "repeat": (lambda: Net(lambda self, x: x * self.w.repeat(len(x), 1, 3), w=weight(3, 2)), (5, 3, 6)),
    "where": (lambda: Net(lambda self, x: torch.where(x > 0, self.w, x).sin(), w=weight(6)), (5, 3, 6)),
    "masked_fill by a scalar": (lambda: Net(lambda self, x: x.masked_fill(x > 0, self.w), w=weight()), (5, 3, 6)),
    "addcmul": (lambda: Net(lambda self, x: torch.addcmul(x, self.w, x, value=0.3), w=weight(6)), (5, 3, 6)),
    "minus, over and to the power of": (
        lambda: Net(
            lambda self, x: (1 - self.a) * (x - self.a) / self.b.exp() + self.b.exp() ** x, a=weight(6), b=weight(3, 1)
        ),
        (5, 3, 6),
    ),
    "maximum": (lambda: Net(lambda self, x: torch.maximum(x, self.w), w=weight(3, 1)), (5, 3, 6)),
    "add with alpha": (lambda: Net(lambda self, x: torch.add(x, self.w, alpha=0.3).sin(), w=weight(6)), (5, 6)),
    "added to and multiplied from the left": (
        lambda: Net(lambda self, x: (self.v + (self.w * x)).sin(), w=weight(6), v=weight(3, 1)),
        (5, 3, 6),
    ),
    "times a mask": (
        lambda: Net(lambda self, x: (x > 0) * self.w + (x < 0) * self.v, w=weight(6), v=weight(1)),
        (5, 3, 6),
    ),
    "attention with learned queries": (
        lambda: Net(
            lambda self, x: F.scaled_dot_product_attention(self.q.expand(len(x), -1, -1, -1), x[:, None], x[:, None]),
            q=weight(1, 2, 6),
        ),
        (5, 3, 6),
    ),
    "a matrix exponential": (lambda: Net(lambda self, x: x @ torch.matrix_exp(self.w), w=weight(6, 6)), (5, 6)),
    "a scalar output": (lambda: Net(lambda self, x: self.a(x).sum((1, 2)), a=nn.Linear(6, 4)), (5, 3, 6)),
}


@pytest.mark.parametrize("name", USES)
def test_use(name: str) -> None:
    """However a model uses a weight, its gradient is exact."""
    factory, shape = USES[name]
    check(factory(), torch.randn(shape))


@pytest.mark.parametrize("name", USES)
def test_use_with_a_single_row(name: str) -> None:
    """A batch of one row, in which every layout looks alike, is exact as well."""
    factory, shape = USES[name]
    check(factory(), torch.randn(1, *shape[1:]))


def test_tied_embedding_and_head() -> None:
    """A table that both embeds and decodes gets the sum of the two gradients, cross-term of the norm included."""
    net = Net(embedded_and_decoded, table=nn.Embedding(20, 6), a=nn.Linear(6, 6))
    gradients = check(net, indices(20, 5, 4))
    assert len(gradients.parts["table.weight"]) == 2


@pytest.mark.parametrize("shape", [(), (1,), (6,), (3, 1), (1, 3, 1), (1, 1, 6), (3, 6), (1, 3, 6)], ids=str)
@pytest.mark.parametrize("name", ["added", "multiplied"])
def test_broadcast(name: str, shape: tuple[int, ...]) -> None:
    """A parameter that is broadcast over the batch gets the sum over all that it was broadcast over."""
    apply = {"added": torch.add, "multiplied": torch.mul}[name]
    check(Net(lambda self, x: torch.sin(apply(x, self.w)) + apply(self.w, x), w=weight(*shape)), torch.randn(5, 3, 6))


@pytest.mark.parametrize("rows", [2, 3, 6])
@pytest.mark.parametrize("shape", [(-1, 1, 1), (-1, 3, 1), (-1, 1, 6), (-1, 3, 6)], ids=str)
def test_a_parameter_along_the_batch(shape: tuple[int, ...], rows: int) -> None:
    """A parameter with an entry per row of the batch is not one that is broadcast, whatever the sizes."""
    shape = (rows, *shape[1:])
    net = Net(
        lambda self, x: self.a(torch.sin(x * self.w) + self.v), w=weight(*shape), v=weight(*shape), a=nn.Linear(6, 2)
    )
    check(net, torch.randn(rows, 3, 6), whole_batch=True)


@pytest.mark.parametrize("rows", [2, 4, 6])
def test_a_weight_whose_columns_run_along_the_batch(rows: int) -> None:
    """A product whose second dimension is the batch is not read as one whose first is."""
    columns = Net(lambda self, x: (self.c @ self.w).T * x, w=weight(6, rows), c=torch.randn(6, 6))
    check(columns, torch.randn(rows, 6), whole_batch=True)
    bias = Net(lambda self, x: torch.addmm(self.b, self.w, x.T).T, w=weight(rows, 6), b=weight(rows))
    check(bias, torch.randn(rows, 6), whole_batch=True)


@pytest.mark.parametrize("dims", [1, 2])
def test_rms_norm_as_gpus_compute_it(dims: int) -> None:
    """A GPU's RMSNorm is one node, which no CPU makes: its rule on what such a node saves, beside autograd."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    shape = x.shape[4 - dims :]
    weight = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 2, *x.shape[1:], generator=generator, dtype=torch.float64)  # two samples a row
    rstd = (x.square().mean(tuple(range(4 - dims, 4)), keepdim=True) + 1e-6).rsqrt()
    node = SimpleNamespace(_saved_input=x, _saved_result1=rstd, _saved_normalized_shape=list(shape))
    use = SimpleNamespace(node=node, slot=1, transposed=False)
    rule: Any = rules.RULES["FusedRmsNorm", 1]
    part = rule(use, rules.Layout("major", 2), dy.flatten(0, 1)[:, None], weight.shape)
    output = F.rms_norm(x, shape, weight, 1e-6)
    for row, sample in itertools.product(range(2), range(2)):
        alone = torch.zeros_like(output)
        alone[row] = dy[row, sample]
        (expected,) = torch.autograd.grad(output, weight, alone, retain_graph=True)
        assert_relative(part.grad[2 * row + sample], expected, 1e-12)


def test_unused_parameters_get_exact_zeros() -> None:
    """What the output does not depend on has a gradient of exactly zero, used or not."""
    net = Net(lambda self, x: self.a(x) + 0 * self.b.sum(), a=nn.Linear(6, 4), b=weight(3), c=weight(2, 2), d=weight())
    gradients = check(net, torch.randn(5, 6), zero=("b", "c", "d"))
    assert gradients.parts["c"] == []


def test_cast_weights() -> None:
    """Weights that are cast on their way to a layer get gradients of their own dtype, to the cast's precision."""
    net = Net(
        lambda self, x: (F.linear(x.float(), self.w.float()) * self.v.float()).double(), w=weight(4, 6), v=weight(4)
    )
    gradients = check(net, torch.randn(5, 6), tolerance=1e-6)
    assert {name: grad.dtype for name, grad in gradients.materialize().items()} == dict.fromkeys("wv", torch.float64)


# --- in-place operations ----------------------------------------------------------------------------------------


def relu_in_place(self: Any, x: Tensor) -> Tensor:
    return self.b(F.relu(self.a(x), inplace=True))


def residual_in_place(self: Any, x: Tensor) -> Tensor:
    out = self.a(x)
    out += x
    return self.b(out.mul_(0.5))


def views_in_place(self: Any, x: Tensor) -> Tensor:
    h = self.a(x).sin()
    h[:, :3].mul_(2)
    h.view(-1, 2, 3)[:, 1].add_(self.w)
    return self.b(h)


def copied_into_slices(self: Any, x: Tensor) -> Tensor:
    h = self.a(x).clone()
    h[:, 1:4] = self.w
    h[:, 0] += self.v
    h[:, 3:] *= self.w
    return self.b(h)


def parameters_in_place(self: Any, x: Tensor) -> Tensor:
    return self.a(x.clone().mul_(self.v).add_(self.v, alpha=2).sub_(self.w.repeat(2)))


def mask_token(self: Any, x: Tensor) -> Tensor:
    h = self.a(x).clone()
    h.view(-1, 2, 3)[torch.tensor([True, False]).expand(len(x), 2)] = self.w
    return self.b(h)


def edited_copy_of_a_weight(self: Any, x: Tensor) -> Tensor:
    w = self.a.weight.clone()
    w[0] = 0
    w[1:3].mul_(2)
    return F.linear(x, w, self.a.bias)


IN_PLACE = [relu_in_place, residual_in_place, views_in_place, copied_into_slices, parameters_in_place, mask_token]


@pytest.mark.parametrize("rows", [1, 3, 6])
@pytest.mark.parametrize("function", [*IN_PLACE, edited_copy_of_a_weight], ids=lambda f: f.__name__)
def test_in_place(function: Callable[[Any, Tensor], Tensor], rows: int) -> None:
    """Operations that change activations, views of them, or copies of weights in place are exact."""
    used = function.__code__.co_names
    members = {"a": nn.Linear(6, 6), "b": nn.Linear(6, 4), "w": weight(3), "v": weight()}
    check(Net(function, **{name: member for name, member in members.items() if name in used}), torch.randn(rows, 6))


def test_an_input_changed_in_place_after_its_use_is_refused() -> None:
    """Autograd refuses to hand out an activation that was overwritten; nothing wrong is returned in its place."""

    def overwritten(self: Any, x: Tensor) -> Tensor:
        h = torch.sin(self.a(x))
        y = self.b(h)
        h.zero_()
        return y

    net = Net(overwritten, a=nn.Linear(6, 6), b=nn.Linear(6, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        extract.extract_gradients(net, torch.randn(5, 6), reference="mean")


def test_inputs_overwritten_after_extraction_leave_the_gradients_alone() -> None:
    """The gradients of one batch survive the reuse of its input's memory for the next batch."""
    for net, inputs in ((layer(nn.Linear(6, 4)), torch.randn(5, 6)), (layer(nn.Embedding(6, 4)), indices(6, 5, 3))):
        gradients = extract.extract_gradients(net, inputs, reference="mean")
        name = next(iter(gradients.shapes))
        before = extract.extract_gradients(net, inputs.clone(), reference="mean").materialize()[name]
        inputs.zero_()
        assert torch.equal(gradients.materialize()[name], before)


# --- saved, recomputed and hidden graphs ------------------------------------------------------------------------


def test_checkpointing_without_reentry() -> None:
    """Recomputed activations are as good as saved ones."""

    def block(self: Any, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x)) * self.w

    def members() -> dict[str, Any]:
        return {"a": nn.Linear(6, 6), "b": nn.Linear(6, 4), "w": weight(6)}

    def recomputed(self: Any, x: Tensor) -> Tensor:
        return self.b(checkpoint(block, self, x, use_reentrant=False))

    twin = Net(lambda self, x: self.b(block(self, x)), **members())
    check(Net(recomputed, **members()), torch.randn(5, 3, 6), twin=twin)


def test_checkpointing_with_reentry_is_refused() -> None:
    """A block that hides its parameters from the graph is refused; their gradients are not silently zero."""

    def recomputed(self: Any, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda x: torch.tanh(self.a(x)), x.clone().requires_grad_(), use_reentrant=True))

    net = Net(recomputed, a=nn.Linear(6, 6), b=nn.Linear(6, 4))
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)checkpoint"):
        extract.extract_gradients(net, torch.randn(5, 6), reference="mean")


def test_a_model_that_differentiates() -> None:
    """A model whose output is itself a gradient (a force field) is exact: the graph then holds second derivatives."""

    def force(self: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.b(torch.tanh(self.a(x))).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    def closed_form(self: Any, x: Tensor) -> Tensor:
        return (self.b.weight * (1 - torch.tanh(self.a(x)).square())) @ self.a.weight

    def members() -> dict[str, Any]:
        return {"a": nn.Linear(6, 5), "b": nn.Linear(5, 1, bias=False)}

    check(Net(force, **members()), torch.randn(4, 6), twin=Net(closed_form, **members()))


def test_inputs_that_require_gradients() -> None:
    """Inputs that require gradients change nothing, and get none."""
    inputs = torch.randn(5, 6)
    net = Net(lambda self, x: self.b(torch.sin(self.a(x))), a=nn.Linear(6, 6), b=nn.Linear(6, 4))
    reference = torch.randn(5, 4)
    plain = extract.extract_gradients(net, inputs, reference=reference).materialize()
    inputs.requires_grad_()
    for name, grad in extract.extract_gradients(net, inputs, reference=reference).materialize().items():
        assert torch.equal(grad, plain[name])
        assert not grad.requires_grad
    assert inputs.grad is None


@pytest.mark.parametrize("kind", ["module", "activation"])
def test_backward_hooks_see_the_backward_pass(kind: str) -> None:
    """Hooks that rescale a gradient on its way back act on the extracted gradients as they do in training."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = torch.sin(self.a(x))
        if kind == "activation" and h.requires_grad:
            h.register_hook(lambda grad: 2 * grad)
        return self.b(h)

    net = Net(forward, a=nn.Linear(6, 6), b=nn.Linear(6, 4))
    if kind == "module":
        net.b.register_full_backward_hook(lambda module, grad_in, grad_out: (2 * grad_in[0],))
    inputs, reference = torch.randn(5, 6), torch.randn(5, 4)
    actual = extract.extract_gradients(net, inputs, reference=reference).materialize()
    for row in range(5):
        net.zero_grad()
        mean_square(net(inputs[row : row + 1])[0], reference[row]).backward()
        for name, p in net.named_parameters():
            assert_relative(actual[name][row], p.grad, TOLERANCE)


# --- complex activations ----------------------------------------------------------------------------------------

SPECTRAL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "multiplied": lambda self, x: torch.fft.ifft(torch.fft.fft(x) * self.w).real,
    "multiplied from the left": lambda self, x: torch.fft.irfft(self.w[:4] * torch.fft.rfft(x), n=6),
    "added": lambda self, x: (torch.fft.fft(x) + self.w).abs(),
    "subtracted": lambda self, x: (torch.fft.fft(x) - self.w).abs(),
    "divided": lambda self, x: (torch.fft.fft(x) / self.w.exp()).abs(),
    "in a matrix product": lambda self, x: (torch.fft.fft(x) @ self.w.diag().to(torch.complex128)).imag,
    "as a complex number": lambda self, x: torch.fft.ifft(torch.fft.fft(x) * torch.complex(self.w, self.w.sin())).real,
    "viewed as complex": lambda self, x: torch.fft.rfft(x)[:, :3].mul(torch.view_as_complex(self.w.view(3, 2))).abs(),
}


@pytest.mark.parametrize("name", SPECTRAL)
def test_real_parameters_of_complex_activations(name: str) -> None:
    """A real parameter that meets complex numbers gets the real part of the conjugate product."""
    check(Net(SPECTRAL[name], w=weight(6)), torch.randn(4, 6))


def test_complex_matrix_product_with_a_cast_weight() -> None:
    """A real weight cast to complex inside a matrix product gets a real, conjugated gradient."""
    net = Net(lambda self, x: (torch.fft.fft(x) @ self.w.to(torch.complex128)).abs(), w=weight(6, 5))
    check(net, torch.randn(4, 6))


# --- where the batch lies ---------------------------------------------------------------------------------------


def sequence_first(self: Any, x: Tensor) -> Tensor:
    """Works on [T, B, D] throughout."""
    h = self.n(torch.tanh(self.a(x.transpose(0, 1))) + self.p[: x.shape[1], None])
    return self.b(h.cumsum(0) * self.w).sin().transpose(0, 1)


def sequence_first_flat(self: Any, x: Tensor) -> Tensor:
    """Works on [T * B, D], time running slowest."""
    rows, length, _ = x.shape
    h = torch.tanh(self.a(x.transpose(0, 1).reshape(length * rows, -1))).view(length, rows, -1)
    return self.b(h.cumsum(0).flatten(0, 1)).view(length, rows, -1).transpose(0, 1)


def heads_first(self: Any, x: Tensor) -> Tensor:
    """Works on [B * H, T, D] and on [H, B, T, D]."""
    h = self.a(x)
    h = torch.stack([h, h.sin(), h.cos()], 1).flatten(0, 1) * self.w
    h = self.b(h).unflatten(0, (-1, 3)).transpose(0, 1)
    return (self.n(h) * self.v).sum(0)


def last_position(self: Any, x: Tensor) -> Tensor:
    """Reads only the last of [T, B, D]: most of what comes back is zero."""
    return self.b(torch.tanh(self.a(x.transpose(0, 1))))[-1]


def images_of_time(self: Any, x: Tensor) -> Tensor:
    """Convolves [T * B, 1, D]."""
    rows, length, width = x.shape
    h = self.c(x.transpose(0, 1).reshape(length * rows, 1, width))
    return h.view(length, rows, -1).cumsum(0).sum(0)


LAYOUTS = [sequence_first, sequence_first_flat, heads_first, last_position, images_of_time]
SIZES = [(1, 4, 3), (4, 4, 4), (2, 4, 2), (3, 6, 3), (6, 3, 6), (5, 1, 5), (2, 2, 2), (4, 2, 6)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "B{}-T{}-D{}".format(*size))
@pytest.mark.parametrize("function", LAYOUTS, ids=lambda f: f.__name__)
def test_batch_elsewhere_than_in_front(function: Callable[[Any, Tensor], Tensor], size: tuple[int, int, int]) -> None:
    """Rows are told apart wherever they lie, also where batch, length and width are the same number."""
    rows, length, width = size
    members = {
        "a": nn.Linear(width, width),
        "b": nn.Linear(width, width),
        "n": scrambled(nn.LayerNorm(width)) if function is not heads_first else scrambled(nn.RMSNorm(width)),
        "p": weight(8, width),
        "w": weight(width),
        "v": weight(length, 1),
        "c": nn.Conv1d(1, 2, 2, padding=1),
    }
    used = function.__code__.co_names
    net = Net(function, **{name: member for name, member in members.items() if name in used})
    check(net, torch.randn(rows, length, width))


NORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layer norm of a vector": lambda self, x: F.layer_norm(self.a(x[0, 0]), (6,), self.w, self.v)[None],
    "layer norm of a matrix": lambda self, x: F.layer_norm(self.a(x[0]), (6,), self.w, self.v)[None],
    "layer norm over a matrix": lambda self, x: F.layer_norm(self.a(x[0]).T, (6, 3), self.m, self.m)[None],
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_without_a_batch_dimension(name: str) -> None:
    """A norm may be given the only row of a batch without its batch dimension."""
    members = {"m": weight(6, 3)} if "over" in name else {"w": weight(6), "v": weight(6)}
    check(Net(NORMS[name], a=nn.Linear(6, 6), **members), torch.randn(1, 3, 6))


BATCH_AS_CHANNELS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "convolution": (lambda self, x: F.conv1d(x[None], self.w, groups=len(x), padding=1)[0], {"w": (4, 1, 3)}),
    "group norm": (lambda self, x: F.group_norm(x[None], 4, self.w, self.v)[0], {"w": (4,), "v": (4,)}),
    "batch norm": (
        lambda self, x: F.batch_norm(x[None], torch.zeros(4), torch.ones(4), self.w, self.v)[0],
        {"w": (4,), "v": (4,)},
    ),
    "layer norm of columns": (lambda self, x: F.layer_norm(x.T, (4,), self.w, self.v).T, {"w": (4,), "v": (4,)}),
    "layer norm over everything": (
        lambda self, x: F.layer_norm(x[None], x.shape, self.w, self.v)[0],
        {"w": (4, -1), "v": (4, -1)},
    ),
    "embedding": (lambda self, x: F.embedding(torch.arange(x.shape[1]) // 2, self.w).T * x, {"w": (3, 4)}),
}


@pytest.mark.parametrize("width", [4, 6])
@pytest.mark.parametrize("name", BATCH_AS_CHANNELS)
def test_batch_as_channels(name: str, width: int) -> None:
    """A layer that takes the rows of the batch for its channels is exact, though no rule knows it."""
    function, shapes = BATCH_AS_CHANNELS[name]
    members = {key: weight(*(width if size < 0 else size for size in shape)) for key, shape in shapes.items()}
    net = Net(lambda self, x: function(self, self.a(x)), a=nn.Linear(width, width), **members)
    check(net, torch.randn(4, width), whole_batch=True)


# --- rows that mix ----------------------------------------------------------------------------------------------


def flipped(h: Tensor) -> Tensor:
    return h.flip(0)


def permuted(h: Tensor) -> Tensor:
    return h[torch.randperm(len(h), generator=torch.Generator().manual_seed(3))]


def rolled_by_13(h: Tensor) -> Tensor:
    return h.roll(13, 0)


def rolled_by_half(h: Tensor) -> Tensor:
    return h.roll(len(h) // 2, 0)


def summed(h: Tensor) -> Tensor:
    return h + h.sum(0)


def barely_mixed(h: Tensor) -> Tensor:
    return h + 1e-6 * h.mean(0)


def next_row_added(h: Tensor) -> Tensor:
    return h + h.roll(13, 0).sin()


MIXERS = [flipped, permuted, rolled_by_13, rolled_by_half, summed, barely_mixed, next_row_added]


@pytest.mark.parametrize("rows", [2, 5, 14, 26, 40])
@pytest.mark.parametrize("mix", MIXERS, ids=lambda f: f.__name__)
def test_rows_that_mix(mix: Callable[[Tensor], Tensor], rows: int) -> None:
    """A model in which rows change places or mix gets the exact gradient of every row's divergence."""
    net = Net(lambda self, x: self.b(mix(torch.tanh(self.a(x)))), a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    check(net, torch.randn(rows, 3), whole_batch=True)


def test_permuted_and_put_back() -> None:
    """Rows that are permuted and put back are the same function of one row, in an order no layout describes."""

    def forward(self: Any, x: Tensor) -> Tensor:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
        return self.b(torch.tanh(self.a(x[order]))[order.argsort()])

    check(Net(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 2)), torch.randn(16, 3))


@pytest.mark.parametrize("scale", [1e-2, 1e-8])
def test_small_rows_that_change_places(scale: float) -> None:
    """Rows whose gradients are tiny beside another's are not mistaken for one another."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.a(x)[[0, 2, 1]] * self.scale[:, None]

    net = Net(forward, a=nn.Linear(3, 3), scale=torch.tensor([1.0, scale, scale]))
    inputs, reference = torch.randn(3, 3), torch.randn(3, 3)
    actual = extract.extract_gradients(net, inputs, reference=reference).materialize()
    for name, grad in truth(net, inputs, reference, whole_batch=True).items():
        for row in range(3):
            assert_relative(actual[name][row], grad[row], TOLERANCE)


def test_batch_statistics() -> None:
    """A batch norm without running statistics mixes rows; each row's divergence is differentiated exactly."""
    net = Net(
        lambda self, x: self.n(self.a(x)).sin(), a=nn.Linear(6, 4), n=nn.BatchNorm1d(4, track_running_stats=False)
    )
    check(net, torch.randn(5, 6), whole_batch=True)


# --- one extractor, many batches --------------------------------------------------------------------------------


def check_batches(net: nn.Module, batches: list[Tensor], whole_batch: bool = False) -> None:
    """Run one extractor over the batches, many times over the first, and hold each against the truth."""
    extractor = Extractor(net, "mse", torch.zeros(()))
    for _ in range(20):
        extractor.reference = torch.randn_like(net(batches[0]))
        extractor(batches[0])
    for batch in batches:
        output = net(batch).detach()
        extractor.reference = torch.randn_like(output)
        actual = extractor(batch).materialize()
        for name, grad in truth(net, batch, extractor.reference, whole_batch).items():
            assert_relative(actual[name], grad, TOLERANCE)


class Experts(nn.Module):
    """A mixture of experts: each gets the rows routed to it, from whichever sequence."""

    def __init__(self, width: int = 3, n_experts: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, n_experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(n_experts))

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(0, 1)
        scores = self.router(h).softmax(-1)
        choice = scores.argmax(-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            index = (choice == i).nonzero()[:, 0]
            out = out.index_add(0, index, expert(h[index]) * scores[index, i, None])
        return out.view(x.shape).sin().cumsum(1)


@pytest.mark.parametrize("rows", [2, 3])
def test_experts_routed_differently_in_every_batch(rows: int) -> None:
    """Where the rows of an expert come from is a matter of the batch, never of the batch before it."""
    torch.manual_seed(1)
    check_batches(Experts(), list(torch.randn(25, rows, 2, 3)))


@pytest.mark.parametrize("rows", [1, 4])
def test_an_expert_without_rows(rows: int) -> None:
    """A layer that gets no rows at all has a gradient of zero."""
    net = Experts()
    with torch.no_grad():
        net.router.bias.copy_(torch.tensor([1e4, -1e4]))
    check(net, torch.randn(rows, 2, 3), zero=("experts.1.weight", "experts.1.bias", "router.weight", "router.bias"))


REORDER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda h, order: h[order],
    "index_select": lambda h, order: h.index_select(0, order),
    "index_copy": lambda h, order: torch.zeros_like(h).index_copy(0, order.argsort(), h),
    "take_along_dim": lambda h, order: torch.take_along_dim(h, order[:, None], 0),
    "stack": lambda h, order: torch.stack([h[i] for i in order.tolist()]),
    "unbind and stack": lambda h, order: torch.stack([h.unbind(0)[i] for i in order.tolist()]),
    "split and cat": lambda h, order: torch.cat([h.split(1)[i] for i in order.tolist()]),
    "written in place": lambda h, order: written_in_place(h, order),
    "a permutation matrix": lambda h, order: torch.eye(len(h))[order] @ h,
    "a permutation matrix on the right": lambda h, order: (h.T @ torch.eye(len(h))[:, order]).T,
    "a product with ones and zeros": lambda h, order: (torch.eye(len(h))[order][..., None] * h).sum(1),
    "a mask": lambda h, order: (
        h.expand(len(h), *h.shape).masked_fill(~torch.eye(len(h), dtype=torch.bool)[order][..., None], 0).sum(1)
    ),
}


def written_in_place(h: Tensor, order: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for place, i in enumerate(order.tolist()):
        out[place] = h[i]
    return out


@pytest.mark.parametrize("name", REORDER)
def test_rows_sorted_by_their_content(name: str) -> None:
    """Rows that happen to be sorted in the first batch are not taken for unsorted in the second."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(REORDER[name](torch.tanh(self.a(x)), x[:, 0].argsort()))

    batch = torch.randn(4, 3)
    batch = batch[batch[:, 0].argsort()]
    net = Net(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    check_batches(net, [batch, batch.flip(0), torch.randn(4, 3), batch], whole_batch=True)


LOOK_UPS = {
    "some rows": [[[1, 2], [7, 8]], [[7, 2], [1, 8]], [[7, 8], [1, 2]]],
    "all rows": [[[0, 1], [2, 3]], [[2, 3], [0, 1]], [[0, 0], [1, 3]]],
}


@pytest.mark.parametrize("name", LOOK_UPS)
def test_computed_embedding_looked_up_in_another_order(name: str) -> None:
    """A table computed before the look-up is not taken for rows of the batch because of one batch's indices."""
    net = Net(
        lambda self, x: F.embedding(x, self.w * self.w).sum(1).sin() @ self.v,
        w=weight(4 if name == "all rows" else 10, 3),
        v=weight(3, 2),
    )
    check_batches(net, [torch.tensor(batch) for batch in LOOK_UPS[name]])


BRANCHES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "flipped": (lambda h: h, lambda h: h.flip(0)),
    "flipped along another dimension": (lambda h: h.flip(1), lambda h: h.flip(0)),
    "rolled further": (lambda h: h.roll(4, 0), lambda h: h.roll(1, 0)),
    "halves exchanged": (lambda h: torch.cat([h[:2], h[2:]]), lambda h: torch.cat([h[2:], h[:2]])),
    "chunks exchanged": (lambda h: torch.cat(h.chunk(2)), lambda h: torch.cat(h.chunk(2)[::-1])),
    "transposed": (lambda h: h.permute(0, 1, 2), lambda h: h.permute(1, 0, 2)),
    "transposed elsewhere": (lambda h: h.transpose(1, 2), lambda h: h.transpose(0, 1)),
    "other strides": (
        lambda h: h.as_strided((4, 4, 4), (16, 4, 1)),
        lambda h: h.as_strided((4, 4, 4), (4, 16, 1)),
    ),
    "summed over another dimension": (
        lambda h: h + h.sum(1, keepdim=True).sum(2, keepdim=True).expand(4, 4, 4),
        lambda h: h + h.sum(1, keepdim=True).sum(0, keepdim=True).expand(4, 4, 4),
    ),
    "accumulated along another dimension": (lambda h: h.cumsum(1), lambda h: h.cumsum(0)),
    "a softmax over another dimension": (lambda h: h.softmax(1), lambda h: h.softmax(0)),
    "stacked along another dimension": (lambda h: torch.stack(h.unbind(0), 0), lambda h: torch.stack(h.unbind(0), 1)),
    "multiplied from the other side": (
        lambda h: (h.flatten(1) @ torch.eye(16).flip(0)).view(4, 4, 4),
        lambda h: (torch.eye(4).flip(0) @ h.flatten(1)).view(4, 4, 4),
    ),
    "attending to another dimension": (
        lambda h: F.scaled_dot_product_attention(h, h, h),
        lambda h: F.scaled_dot_product_attention(*[h.transpose(0, 1)] * 3).transpose(0, 1),
    ),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_control_flow_changes_the_order_of_rows(name: str) -> None:
    """The rows may lie elsewhere when the input takes another branch, though batch, length and width are equal."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(torch.tanh(BRANCHES[name][int(x.sum() < 0)](self.a(x))))

    batch = torch.rand(4, 4, 4)
    net = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    check_batches(net, [batch, -batch, batch, -batch.flip(0)], whole_batch=True)


def test_control_flow_changes_the_number_of_uses() -> None:
    """A layer may be used a different number of times, or not at all, in every batch."""

    def forward(self: Any, x: Tensor) -> Tensor:
        for _ in range(int(x[0, 0])):
            x = torch.sin(self.a(x))
        return self.b(x)

    batch = torch.randn(4, 3)
    batches = [torch.cat([torch.full((4, 1), float(n)), batch[:, 1:]], 1) for n in (1, 3, 0, 2)]
    check_batches(Net(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 2)), batches)


@pytest.mark.parametrize("dead", ["all", "most"])
def test_zeros_in_the_first_batch(dead: str) -> None:
    """A first batch whose gradients are zero at many rows does not settle where the rows lie for the next."""

    def forward(self: Any, x: Tensor) -> Tensor:  # [B, T, D] -> [T * B, D]: time is slowest
        rows, length, width = x.shape
        h = self.a(x.transpose(0, 1).reshape(length * rows, width)).view(length, rows, width)
        return self.b(torch.relu(h)).sum(0)

    net = Net(forward, a=nn.Linear(3, 3, bias=False), b=nn.Linear(3, 2))
    with torch.no_grad():
        net.a.weight.copy_(torch.eye(3))
    first = -torch.rand(2, 2, 3)
    if dead == "most":
        first[0, 0], first[1, 1] = torch.rand(2, 3)
    check_batches(net, [first, torch.rand(2, 2, 3) + 0.1, first])


def test_batches_of_other_sizes() -> None:
    """The number of rows may change from batch to batch."""
    net = Net(sequence_first, a=nn.Linear(4, 4), b=nn.Linear(4, 4), n=nn.LayerNorm(4), p=weight(8, 4), w=weight(4))
    check_batches(net, [torch.randn(rows, 4, 4) for rows in (2, 4, 1, 3, 4, 8)])


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
    """Rules claim the layers they are for, and each fallback is reached by what it is for; all are exact."""
    factory, make, expected = PATHS[name]
    check(factory(), make(), whole_batch=True)
    assert {parameter: paths[parameter] for parameter in expected} == {k: {v} for k, v in expected.items()}


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
