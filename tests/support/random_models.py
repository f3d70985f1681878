"""Draw small models at random, and compare their gradients with a loop of autograd over the samples, in float64."""

from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l3d

from layer_checks import Multiply, Net, weight
from random_cases import seeded

Shape = tuple[int, ...]  # of one row: features last; (positions, features) or (channels, pixels); (channels, *pixels)
Block = Callable[[Random, Shape], nn.Module]


def width(r: Random) -> int:
    return r.randint(2, 5)


def flip(r: Random, p: float = 0.5) -> bool:
    return r.random() < p


# --- blocks of any shape: they act on the last dimension ---------------------------------------------------------


def linear(r: Random, s: Shape) -> nn.Module:
    return nn.Linear(s[-1], width(r), bias=flip(r, 0.7))


def functional(r: Random, s: Shape) -> nn.Module:
    """A matrix product written in some way other than nn.Linear, the weight stored either way round."""
    i, o, h = s[-1], width(r), r.randint(1, 2)
    return r.choice(
        (
            lambda: Net(lambda m, x: F.linear(x, m.w, m.b), w=weight(o, i), b=weight(o)),
            lambda: Net(lambda m, x: F.linear(x, m.w.t()), w=weight(i, o)),
            lambda: Net(lambda m, x: x @ m.w + m.b, w=weight(i, o), b=weight(o)),
            lambda: Net(lambda m, x: torch.matmul(x, m.w.mT), w=weight(o, i)),
            lambda: Net(lambda m, x: torch.einsum("...i,oi->...o", x, m.w), w=weight(o, i)),
            lambda: Net(lambda m, x: torch.einsum("...i,iho->...ho", x, m.w).flatten(-2), w=weight(i, h, o)),
            lambda: Net(lambda m, x: torch.tensordot(x, m.w, dims=1), w=weight(i, o)),
            lambda: Net(lambda m, x: torch.addmm(m.b, x.reshape(-1, i), m.w, beta=0.5, alpha=1.5)
                        .view(*x.shape[:-1], o), w=weight(i, o), b=weight(o)),
            lambda: Net(lambda m, x: torch.bmm(x.reshape(len(x), -1, i), m.w.expand(len(x), i, o))
                        .view(*x.shape[:-1], o), w=weight(i, o)),
            lambda: Net(lambda m, x: torch.baddbmm(m.b, x.reshape(1, -1, i), m.w).view(*x.shape[:-1], o),
                        w=weight(1, i, o), b=weight(1, 1, o)),
            lambda: Net(lambda m, x: F.linear(x, m.w[:o]) + F.linear(x, m.w[o:]), w=weight(2 * o, i)),
            lambda: Net(lambda m, x: F.linear(x, torch.cat([m.v, m.w])), v=weight(1, i), w=weight(o, i)),
            lambda: Net(lambda m, x: F.linear(x, m.u @ m.v), u=weight(o, 2), v=weight(2, i)),
            lambda: Net(lambda m, x: F.linear(x, m.w * m.mask), w=weight(o, i), mask=torch.rand(o, i)),
            lambda: Net(lambda m, x: F.linear(x, m.w / m.w.norm(dim=1, keepdim=True)), w=weight(o, i)),
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(i, o)),
            lambda: Net(lambda m, x: m.layer(x, x.sin()), layer=nn.Bilinear(i, i, o)),
            lambda: Net(lambda m, x: Multiply.apply(x.reshape(-1, i), m.w).view(*x.shape[:-1], o), w=weight(i, o)),
            lambda: Net(lambda m, x: (x[..., None, :] * m.w).sum(-1), w=weight(o, i)),
            lambda: Net(lambda m, x: -torch.cdist(x.reshape(-1, i), m.w).view(*x.shape[:-1], o), w=weight(o, i)),
        )
    )()  # fmt: skip


def tied(r: Random, s: Shape) -> nn.Module:
    """One weight used twice: there and back, in two kinds of use, or in a module that is called again."""
    i, o, n = s[-1], width(r), r.randint(2, 3)

    def again(m: Any, x: Tensor) -> Tensor:
        for _ in range(n):
            x = torch.tanh(m.layer(x))
        return x

    return r.choice(
        (
            lambda: Net(lambda m, x: torch.tanh(F.linear(x, m.w, m.b)) @ m.w, w=weight(o, i), b=weight(o)),
            lambda: Net(lambda m, x: F.linear(x, m.w) * m.w.sum(1), w=weight(o, i)),
            lambda: Net(lambda m, x: F.linear(x * m.w[0], m.w), w=weight(o, i)),
            lambda: Net(again, layer=nn.Linear(i, i)),
            lambda: Net(again, layer=nn.Sequential(nn.LayerNorm(i), nn.Linear(i, i))),
        )
    )()


def norm(r: Random, s: Shape) -> nn.Module:
    d = s[-1]
    whole = s if flip(r, 0.3) else (d,)
    return r.choice(
        (
            lambda: nn.LayerNorm(whole, bias=flip(r, 0.7)),
            lambda: nn.RMSNorm(whole),
            lambda: Net(lambda m, x: m.g * x * (x.square().mean(-1, keepdim=True) + 1e-2).rsqrt(), g=weight(d)),
            lambda: Net(lambda m, x: (1 + m.g) * F.layer_norm(x, (d,)), g=weight(d)),
            lambda: group_norm(r, s),
        )
    )()


def group_norm(r: Random, s: Shape) -> nn.Module:
    """torch refuses groups of a single entry."""
    fitting = [n for n in range(1, s[0] + 1) if s[0] % n == 0 and torch.Size(s).numel() > n]
    return nn.GroupNorm(r.choice(fitting), s[0]) if fitting else nn.LayerNorm(s[-1])


def elementwise(r: Random, s: Shape) -> nn.Module:
    """Scales and shifts of every shape that broadcasts."""
    shape = r.choice((s, s[-1:], (1, *s), (), (1,), (*s[:-1], 1)))
    return r.choice(
        (
            lambda: Net(lambda m, x: x * m.g, g=weight(*shape)),
            lambda: Net(lambda m, x: torch.add(x, m.g, alpha=0.5), g=weight(*shape)),
            lambda: Net(lambda m, x: m.g - x, g=weight(*shape)),
            lambda: Net(lambda m, x: x / (2 + m.g.sin()), g=weight(*shape)),
            lambda: Net(lambda m, x: torch.where(x > 0, x, m.g * x), g=weight(*shape)),
            lambda: Net(lambda m, x: torch.addcmul(x, x.sin(), m.g, value=0.5), g=weight(*shape)),
            lambda: Net(lambda m, x: torch.lerp(x, x.cos(), m.g.expand_as(x)), g=weight(*shape)),
            lambda: Net(lambda m, x: x.clone().mul_(m.g).add_(m.h), g=weight(*s), h=weight(*s[-1:])),
        )
    )()


def activation(r: Random, s: Shape) -> nn.Module:
    """Some in place, of a tensor that the layer before may have saved."""
    return r.choice(
        (
            nn.ReLU, nn.Tanh, nn.GELU, nn.Softplus, nn.PReLU, lambda: nn.Softmax(-1), lambda: nn.ReLU(inplace=True),
            lambda: nn.SiLU(inplace=True), lambda: nn.LeakyReLU(0.1, inplace=True), lambda: Net(lambda m, x: x.sin()),
            lambda: Net(lambda m, x: (x + 0).tanh_()), lambda: nn.Hardtanh(inplace=True),
        )
    )()  # fmt: skip


def gated(r: Random, s: Shape) -> nn.Module:
    d, h = s[-1], width(r)
    return Net(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(d, h, bias=False), up=nn.Linear(d, h, bias=False), down=nn.Linear(h, d, bias=False),
    )  # fmt: skip


def experts(r: Random, s: Shape) -> nn.Module:
    """Routing: each row goes to the experts that its gate prefers, or reads a weight of its own."""
    d, n, top = s[-1], r.randint(2, 4), r.randint(1, 2)

    def sent(m: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, d)
        best = m.gate(rows).softmax(-1).topk(top)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(m.experts):
            which, place = (best.indices == i).nonzero(as_tuple=True)
            if len(which):
                out = out.index_add(0, which, expert(rows[which]) * best.values[which, place, None])
        return out.view(x.shape)

    def looked_up(m: Any, x: Tensor) -> Tensor:
        best = m.gate(x).max(-1)
        return (m.w[best.indices] @ x[..., None])[..., 0] * best.values[..., None]

    def batched(m: Any, x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, d).expand(n, -1, -1)
        each = torch.bmm(rows, m.w).transpose(0, 1)  # [rows, experts, d]
        return (each * m.gate(x).softmax(-1).view(-1, n, 1)).sum(1).view(x.shape)

    gate = nn.Linear(d, n)
    if flip(r):
        return Net(sent, gate=gate, experts=nn.ModuleList(nn.Linear(d, d) for _ in range(n)))
    return Net(r.choice((looked_up, batched)), gate=gate, w=weight(n, d, d))


def residual(r: Random, s: Shape) -> nn.Module:
    """x + f(x), out of place or in place, or two branches appended."""
    inner = nn.Sequential(block(r, s), nn.Tanh())
    if shape_after(inner, s) != s:
        return Net(lambda m, x: torch.cat([m.inner(x).flatten(1), x.flatten(1)], 1), inner=inner)

    def in_place(m: Any, x: Tensor) -> Tensor:
        out = m.inner(x).clone()
        out += x
        return out

    return Net(r.choice((in_place, lambda m, x: x + m.inner(x), lambda m, x: m.inner(x) * x)), inner=inner)


# --- positions [T, D], or channels and pixels [C, L] --------------------------------------------------------------


def attention(r: Random, s: Shape) -> nn.Module:
    """By hand, with torch's function, or with its modules; some with fewer keys than queries."""
    T, d = s
    heads, h, causal = r.randint(1, 2), r.randint(1, 3), flip(r)
    groups = r.choice((1, heads))
    mask = torch.zeros(T, T).masked_fill(torch.ones(T, T).triu(1) > 0, -torch.inf) if causal else torch.zeros(T, T)

    def combine(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (-1, h)).transpose(1, 2) for each in (q, k, v))
        k, v = (each.repeat_interleave(heads // groups, 1) for each in (k, v))
        if by_hand:
            found = (q @ k.mT / h**0.5 + mask).softmax(-1) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return m.out(found.transpose(1, 2).flatten(2))

    def separate(m: Any, x: Tensor) -> Tensor:
        return combine(m, m.q(x), m.k(x), m.v(x))

    def packed(m: Any, x: Tensor) -> Tensor:
        return combine(m, *m.qkv(x).split([heads * h, groups * h, groups * h], -1))

    def per_head(m: Any, x: Tensor) -> Tensor:
        q, k, v = torch.einsum("btd,cnde->cbnte", x, m.w)
        return torch.einsum("bnte,ned->btd", (q @ k.mT + mask).softmax(-1) @ v, m.o)

    def module(m: Any, x: Tensor) -> Tensor:
        x = x if m.layer.batch_first else x.transpose(0, 1)
        out = m.layer(x, x, x, attn_mask=mask, need_weights=weights)[0]
        return out if m.layer.batch_first else out.transpose(0, 1)

    by_hand, weights, bias = flip(r), flip(r), flip(r)
    kind = r.randrange(5)
    if kind == 0:
        q, k, v = (nn.Linear(d, n * h, bias=bias) for n in (heads, groups, groups))
        return Net(separate, q=q, k=k, v=v, out=nn.Linear(heads * h, d))
    if kind == 1:
        return Net(packed, qkv=nn.Linear(d, (heads + 2 * groups) * h, bias=bias), out=nn.Linear(heads * h, d))
    if kind == 2:
        return Net(per_head, w=weight(3, heads, d, h), o=weight(heads, h, d))
    heads = r.choice([n for n in (1, 2, 3) if d % n == 0])
    if kind == 3:
        return Net(module, layer=nn.MultiheadAttention(d, heads, bias=bias, batch_first=flip(r), add_bias_kv=False))
    return nn.TransformerEncoderLayer(d, heads, width(r), 0.0, batch_first=True, norm_first=flip(r))


def positions(r: Random, s: Shape) -> nn.Module:
    """Learned positions, mixing along the positions, models of which the sequence is first."""
    T, d = s
    recurrent = r.choice((nn.GRU, nn.LSTM, nn.RNN))
    inner = r.choice((linear, functional, tied, gated))(r, s)
    return r.choice(
        (
            lambda: Net(lambda m, x: x + m.table(torch.arange(T)), table=nn.Embedding(T, d)),
            lambda: Net(lambda m, x: x + m.table(torch.arange(T)[None]), table=nn.Embedding(T, d)),
            lambda: Net(lambda m, x: x + m.table.weight[:T], table=nn.Embedding(T + 1, d)),
            lambda: Net(lambda m, x: torch.cat([m.first.expand(len(x), 1, d), x], 1), first=weight(1, 1, d)),
            lambda: Net(lambda m, x: m.mix(x.mT).mT, mix=nn.Linear(T, T)),
            lambda: Net(lambda m, x: m.w @ x, w=weight(T, T)),
            lambda: Net(lambda m, x: x.cumsum(1) * m.g, g=weight(d)),
            lambda: Net(lambda m, x: m.layer(x)[0], layer=recurrent(d, width(r), batch_first=True)),
            lambda: Net(lambda m, x: m.layer(x.transpose(0, 1))[0].transpose(0, 1), layer=recurrent(d, width(r))),
            lambda: Net(lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1), inner=inner),
            lambda: Net(lambda m, x: torch.stack([m.inner(x[:, t]) for t in range(T)], 1), inner=nn.Linear(d, 3)),
            lambda: Net(lambda m, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * m.w, n=T, dim=1),
                        w=weight(T // 2 + 1, d)),
        )
    )()  # fmt: skip


# --- channels and pixels ------------------------------------------------------------------------------------------


def convolution(r: Random, s: Shape) -> nn.Module:
    """In one or two dimensions, with groups, strides, dilation, padding of every kind; transposed; functional."""
    dims, c = len(s) - 1, s[0]
    groups = r.choice([n for n in range(1, c + 1) if c % n == 0])
    kernel = [r.randint(1, min(3, size)) for size in s[1:]]
    fits = [(size - 1) // max(1, k - 1) for k, size in zip(kernel, s[1:], strict=True)]
    dilation = [r.randint(1, min(3, max(1, largest))) for largest in fits]
    stride, padding = [r.randint(1, 2) for _ in kernel], [r.randint(0, 1) for _ in kernel]
    layers: Any = (nn.Conv1d, nn.Conv2d)[dims - 1], (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
    out = groups * r.randint(1, 2)
    options = {"groups": groups, "bias": flip(r)}
    if flip(r, 0.15):
        return layers[1](c, out, kernel, stride, **options)
    if flip(r, 0.2):
        return layers[0](c, out, kernel, dilation=dilation, padding="same", **options)
    if flip(r, 0.2):
        call = (F.conv1d, F.conv2d)[dims - 1]
        w = weight(out, c // groups, *kernel)
        return Net(lambda m, x: call(x, m.w / (1 + m.w.norm()), None, stride, padding, dilation, groups), w=w)
    mode = r.choice(("zeros", "circular", "reflect")) if min(s[1:]) > 1 else "zeros"
    return layers[0](c, out, kernel, stride, padding, dilation, padding_mode=mode, **options)


def channels(r: Random, s: Shape) -> nn.Module:
    """Norms per channel, pooling, and what else images meet."""
    dims, c = len(s) - 1, s[0]
    batch: Any = (nn.BatchNorm1d, nn.BatchNorm2d)[dims - 1]
    instance: Any = (nn.InstanceNorm1d, nn.InstanceNorm2d)[dims - 1]
    pools: Any = ((nn.AvgPool1d, nn.MaxPool1d), (nn.AvgPool2d, nn.MaxPool2d))[dims - 1]
    found = [lambda: batch(c), lambda: nn.PReLU(c), lambda: group_norm(r, s)]
    if torch.Size(s[1:]).numel() > 1:
        # torch 2.13 differentiates this norm of a single row wrongly where the gradient's channels lie last; the views
        # after it have them lie first
        found.append(lambda: nn.Sequential(instance(c, affine=True), nn.Flatten(), nn.Unflatten(1, s)))
    if min(s[1:]) > 3:
        found += [lambda: pools[0](2), lambda: pools[1](2)]
    return r.choice(found)()


def reshaped(r: Random, s: Shape) -> nn.Module:
    """Rows that are read otherwise: flattened, averaged, cut into patches, transposed."""
    if len(s) == 1:
        n = r.choice([n for n in range(1, s[0] + 1) if s[0] % n == 0])
        return nn.Unflatten(1, (n, s[0] // n))
    if len(s) == 2:
        return r.choice((nn.Flatten(), Net(lambda m, x: x.mT), Net(lambda m, x: x.mean(1)), Net(lambda m, x: x[:, -1])))
    return r.choice((nn.Flatten(), nn.Flatten(2), Net(lambda m, x: x.flatten(2).mT), Net(lambda m, x: x.mean((2, 3)))))


def mixing(r: Random, s: Shape) -> nn.Module:
    """Rows that are not independent: centred over the batch, or with a share of the row before."""
    function = r.choice((lambda m, x: x - x.mean(0), lambda m, x: x + 0.5 * x.roll(1, 0)))
    return nn.Sequential(nn.Linear(s[-1], width(r)), Net(function), nn.Tanh())


ANY: list[Block] = [linear, linear, functional, functional, tied, norm, elementwise, activation, gated, experts]
KINDS: dict[int, list[Block]] = {
    1: [*ANY, residual, reshaped],
    2: [*ANY, residual, reshaped, attention, attention, positions, positions, convolution, channels],
    3: [convolution, convolution, channels, channels, activation, elementwise, residual, linear, reshaped],
}


def block(r: Random, s: Shape) -> nn.Module:
    """Draw a block for rows of this shape."""
    return r.choice(KINDS[len(s)])(r, s)


@torch.no_grad()
def shape_after(module: nn.Module, s: Shape) -> Shape:
    return tuple(module.eval()(torch.randn(2, *s)).shape[1:])


# --- a model with its batch, divergence and reference -------------------------------------------------------------


class Model(nn.Module):
    """An optional table of tokens, a body, and a head, which may be the table; the output may be in a mapping."""

    def __init__(self, table: nn.Module | None, body: nn.Module, head: nn.Module | None, named: bool) -> None:
        super().__init__()
        self.table, self.body, self.head, self.named = table, body, head, named

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        h = self.body(x if self.table is None else self.table(x))
        out = F.linear(h, self.table.weight) if self.head is None else self.head(h)
        return {"logits": out} if self.named else out


class Case(NamedTuple):
    """What `extract_gradients` is asked, and whether the rows depend on one another."""

    model: nn.Module
    inputs: Tensor
    mask: Tensor | None  # [B, T], of inputs that are a mapping
    contrast: Tensor | None
    divergence: Any
    reference: Any
    params: Any
    positions: Any
    mixes: bool


def cubic(output: Tensor, reference: Tensor) -> Tensor:
    return (output - reference).abs().pow(3).flatten(1).mean(1)


def cosine(output: Tensor, reference: Tensor) -> Tensor:
    a, b = output.flatten(1), reference.flatten(1)
    return (a * b).sum(1) / ((1 + a.square().sum(1)) * (1 + b.square().sum(1))).sqrt()


def probabilities(output: Tensor, reference: Tensor) -> Tensor:
    return (output.softmax(-1) - reference.softmax(-1)).square().flatten(1).sum(1)


class Drawn(NamedTuple):
    """A model, a function that draws batches for it, and whether the rows of a batch depend on one another."""

    model: Model
    rows: Callable[[], Tensor]
    mixes: bool


def draw_model(r: Random) -> Drawn:
    """Draw a model of one to four blocks under a head, with its kind of data."""
    B = r.choice((1, 2, 3, 3, 4, 5, 6))
    words = flip(r, 0.35)
    d, T, V = width(r), r.randint(1, 5), r.randint(4, 9)
    s: Shape = (T, d) if words else r.choice(((d,), (T, d), (r.randint(1, 4), 5, r.randint(4, 6))))
    table = nn.Embedding(V, d, padding_idx=r.choice((None, None, 0, -1))) if words else None
    shape, blocks, mixes = s, [], False
    for _ in range(r.randint(1, 4)):
        blocks.append(block(r, shape))
        shape = shape_after(blocks[-1], shape)
    if B > 1 and flip(r, 0.04):
        blocks.append(mixing(r, shape))
        shape, mixes = shape_after(blocks[-1], shape), True
    if torch.Size(shape).numel() > 24 and not words:
        blocks.append(nn.Flatten())
        shape = shape_after(blocks[-1], shape)
    head = r.choice((linear, linear, functional))(r, shape)
    tie = words and shape[-1] == d and flip(r)
    model = Model(table, nn.Sequential(*blocks), None if tie else head, named=flip(r, 0.2)).eval()
    scale = r.choice((0.4, 0.7, 1.0))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "running_var" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
        elif "running_mean" in name or isinstance(tensor, nn.Parameter):
            nn.init.normal_(tensor, std=scale)
    return Drawn(model, lambda: torch.randint(V, (B, T)) if words else torch.randn(B, *s), mixes)


def draw_case(r: Random) -> Case:
    """Draw everything; torch's generator must have been seeded."""
    while True:
        model, rows, mixes = draw_model(r)
        inputs = rows()
        output = logits(model(inputs.clone()))
        try:
            output.sum().backward()
        except RuntimeError:  # an operation in place changed what the one before it had saved
            continue
        model.zero_grad()
        output = output.detach()
        break
    words, T = model.table is not None, inputs.shape[-1]
    width_out = output.shape[-1]
    divergences = ["mse", "mse", "mse_published", cubic, cosine, probabilities] + ["kl"] * 3 * (width_out > 1)
    divergence = None if flip(r, 0.15) else r.choice(divergences)
    by_position = output.ndim > 2 and resolved(divergence, model, output) not in ("mse", "mse_published")
    n_positions = positions_of(divergence, model, output)
    where = r.choice(("all", "last", r.randint(1, n_positions))) if by_position else r.choice(("all", "last", 1))
    mask = None
    if words and by_position and output.shape[1] == T == n_positions and flip(r, 0.4):
        mask = (torch.arange(T) < torch.randint(1, T + 1, (len(inputs), 1))).long()
        mask = mask.flip(1) if flip(r, 0.3) else mask
    n = len(chosen_samples(divergence, model, output, where, mask, torch.Generator())[0])
    kinds = ["uniform", "pair", "tensor", "tensor"] + ["sample", "sample", "mean"] * (n > 1)
    reference = r.choice(kinds)
    if mask is not None and reference == "pair":
        reference = "uniform"  # a mapping has no pair
    contrast = rows() if reference == "pair" else None
    if reference == "tensor":
        own = sample_shape(divergence, model, output)
        shapes = [(n, *own), own] + ([tuple(output.shape)] if mask is None or by_position else [])
        reference = torch.randn(r.choice(shapes))
    names = [name for name, _ in model.named_parameters()]
    params = r.choice((None, None, None, "*", "body.*", [r.choice(names), r.choice(names)]))
    if params == "body.*" and not any(name.startswith("body.") for name in names):
        params = None
    for p in model.parameters():
        p.requires_grad_(flip(r, r.choice((1.0, 1.0, 0.5, 0.0))))
    return Case(model, inputs, mask, contrast, divergence, reference, params, where, mixes)


# --- the truth ----------------------------------------------------------------------------------------------------


def logits(raw: Any) -> Tensor:
    return raw["logits"] if isinstance(raw, dict) else raw


def resolved(divergence: Any, model: Any, output: Tensor) -> Any:
    """Return what None means: kl for logits [B, T, V] in a mapping, else mse."""
    if divergence is not None:
        return divergence
    return "kl" if model.named and output.ndim == 3 and output.shape[2] > 1 else "mse"


def sample_shape(divergence: Any, model: Any, output: Tensor) -> Shape:
    """Return the shape of one sample's output: of kl's positions the last dimension, of a function's all after two."""
    chosen = resolved(divergence, model, output)
    if chosen in ("mse", "mse_published") or output.ndim < 3:
        return tuple(output.shape[1:])
    return tuple(output.shape[-1:] if chosen == "kl" else output.shape[2:])


def positions_of(divergence: Any, model: Any, output: Tensor) -> int:
    return output.shape[1:].numel() // torch.Size(sample_shape(divergence, model, output)).numel()


def chosen_samples(
    divergence: Any, model: Any, output: Tensor, where: Any, mask: Tensor | None, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Return every sample's row and position, in order; "all" are all that are not padding."""
    n, B = positions_of(divergence, model, output), len(output)
    if output.ndim < 3 or resolved(divergence, model, output) in ("mse", "mse_published"):
        return list(range(B)), [0] * B
    real = torch.ones(B, n, dtype=torch.bool) if mask is None else mask.bool()
    by_row: list[list[int]] = [[t for t in range(n) if real[row, t]] for row in range(B)]
    if where == "last":
        by_row = [places[-1:] for places in by_row]
    elif where != "all":  # the smallest of one draw per position
        draws = torch.rand(B, n, generator=generator, dtype=torch.float32)
        by_row = [sorted(sorted(places, key=draws[i].__getitem__)[:where]) for i, places in enumerate(by_row)]
    pairs = [(row, t) for row, places in enumerate(by_row) for t in places]
    return [row for row, _ in pairs], [t for _, t in pairs]


def measure(kind: Any, output: Tensor, reference: Tensor) -> Tensor:
    """Return one sample's divergence, written out."""
    if kind == "mse":
        return (output - reference).square().mean()
    if kind == "mse_published":
        return (output * (output - reference)).mean()
    if kind == "kl":
        return F.kl_div(output.log_softmax(-1), reference.log_softmax(-1), reduction="sum", log_target=True)
    return kind(output[None], reference[None])[0]


def truth(case: Case, seed: int) -> dict[str, Tensor]:
    """Differentiate sample by sample: {name: [S, *shape]} for all parameters; each row alone unless rows mix."""
    model: Any = deepcopy(case.model).requires_grad_()
    generator = torch.Generator().manual_seed(seed)

    def outputs(batch: Tensor) -> Tensor:
        if case.mixes:
            return logits(model(batch.clone()))
        return torch.cat([logits(model(batch[i : i + 1].clone())) for i in range(len(batch))])

    output = outputs(case.inputs)
    kind, own = resolved(case.divergence, model, output), sample_shape(case.divergence, model, output)
    rows, places = chosen_samples(case.divergence, model, output, case.positions, case.mask, generator)
    S = len(rows)

    def of_samples(whole: Tensor) -> Tensor:
        return whole.reshape(len(whole), -1, *own)[rows, places]

    at = of_samples(output)
    fixed = at.detach()
    reference = case.reference
    if isinstance(reference, Tensor):
        reference = of_samples(reference) if reference.shape == output.shape != (S, *own) else reference.expand(S, *own)
    elif reference == "sample":
        shift = torch.randint(1, S, (S,), generator=generator)
        reference = fixed[(torch.arange(S) + shift) % S]
    elif reference == "mean":
        mean = fixed.softmax(-1).mean(0).log() if kind == "kl" else fixed.mean(0)
        reference = mean.expand(S, *own)
    elif reference == "uniform":
        reference = torch.zeros_like(fixed)
    else:
        assert case.contrast is not None
        reference = of_samples(outputs(case.contrast)).detach()

    parameters = dict(model.named_parameters())
    found: list[tuple[Tensor, ...]] = []
    for sample in range(S):
        value = measure(kind, at[sample], reference[sample])
        found.append(torch.autograd.grad(value, list(parameters.values()), retain_graph=True, materialize_grads=True))
    return {name: torch.stack(each) for name, each in zip(parameters, zip(*found, strict=True), strict=True)}


TOLERANCE = 1e-9  # of a sample's largest entry in a tensor, and
SLACK = 1e-13  # of 1, or of the largest entry: what is left where a gradient cancels, as that of a key's bias does


def check_model(seed: int) -> dict[str, int]:
    """Draw model number `seed` and compare all its gradients; return what was compared.

    Raises ValueError where `extract_gradients` refuses the model, AssertionError where a number is wrong.
    """
    with seeded(seed) as r:
        case = draw_case(r)
        expected = truth(case, seed)
        before = deepcopy(case.model.state_dict()), [p.requires_grad for p in case.model.parameters()]
        inputs: Any = case.inputs if case.mask is None else {"x": case.inputs, "attention_mask": case.mask}
        gradients = l3d.extract_gradients(
            case.model, inputs if case.contrast is None else (inputs, case.contrast), case.divergence, case.reference,
            case.params, case.positions, torch.Generator().manual_seed(seed),
        )  # fmt: skip
        squared_norm, actual = gradients.squared_norm(), gradients.materialize()
    right = {name: expected[name].reshape(len(expected[name]), -1) for name in actual}
    largest = max(float(grad.abs().max()) for grad in right.values())
    for name, grad in actual.items():
        assert grad.shape == expected[name].shape, f"{name}: {list(grad.shape)}, not {list(expected[name].shape)}"
        size = right[name].abs().amax(1)
        error = (grad.reshape(right[name].shape) - right[name]).abs().amax(1)
        assert bool((error <= TOLERANCE * size + SLACK * max(1, largest)).all()), (
            f"{name}: {error.tolist()} of {size.tolist()}"
        )
    total = torch.stack([grad.square().sum(1) for grad in right.values()]).sum(0)
    limit = TOLERANCE * total + SLACK * max(1, largest) ** 2
    assert bool(((squared_norm - total).abs() <= limit).all()), f"norms {squared_norm.tolist()}, not {total.tolist()}"
    assert before[1] == [p.requires_grad for p in case.model.parameters()], "requires_grad has changed"
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), case.model.state_dict().values(), strict=True))
    counts = {"tensors": len(actual), "samples": len(total)}
    return counts | {"models whose rows mix": case.mixes, "models without a gradient": largest == 0}
