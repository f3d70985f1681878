"""Compare gradients with torch.func's wherever a batch's rows lie: transposed, mixed, reordered in every batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l3d.gradients import extract
from l3d.gradients.extract import Extractor

from helpers import assert_relative
from layer_checks import TOLERANCE, Net, check, scrambled, truth, weight

pytestmark = pytest.mark.usefixtures("float64")


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
    """Reads only the last of [T, B, D]: most of the output gradient is zero."""
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
    """Each batch routes its own rows to an expert: the previous batch's routing is not reused."""
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
