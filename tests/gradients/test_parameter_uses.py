"""Compare gradients with torch.func's for every way a model can use a parameter, outside of torch.nn's layers."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from l3d.gradients import extract, rules

from helpers import assert_relative
from layer_checks import TOLERANCE, Multiply, Net, check, indices, layer, mean_square, weight

pytestmark = pytest.mark.usefixtures("float64")


# --- weights used in other ways ---------------------------------------------------------------------------------


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
    node.name = lambda: "FusedRmsNormBackward0"
    use = SimpleNamespace(node=node, slot=1, transposed=False)
    (rule,) = cast("Any", rules.RULES["FusedRmsNorm", 1])
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
