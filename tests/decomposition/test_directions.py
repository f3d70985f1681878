"""Check low-rank directions: resolved ranks, factors against materialised tensors, unit norms."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from l3d.api import Decomposition
from l3d.decomposition import directions as directions_module
from l3d.decomposition.directions import Directions, LowRank, Tucker, Whole, resolve_ranks

from helpers import assert_relative

SHAPES = {
    "embed.weight": torch.Size([11, 4]),
    "layers.0.attn.q.weight": torch.Size([6, 4]),
    "layers.0.attn.q.bias": torch.Size([6]),
    "layers.1.attn.q.weight": torch.Size([6, 4]),
    "conv.weight": torch.Size([5, 4, 3, 2]),
    "depthwise.weight": torch.Size([6, 1, 3]),
    "scale": torch.Size([]),
}
MATRICES = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}


@pytest.mark.parametrize(
    "rank, expected",
    [
        (1, {"embed.weight": (1,), "conv.weight": (1, 1, 1, 1), "depthwise.weight": (1, 1, 1)}),
        (3, {"embed.weight": (3,), "conv.weight": (3, 3, 3, 2), "depthwise.weight": (3, 1, 3)}),
        ({"*": 2}, {"layers.0.attn.q.weight": (2,), "conv.weight": (2, 2, 2, 2), "depthwise.weight": (2, 1, 2)}),
        ({"layers.*": 4, "*": 1}, {"layers.1.attn.q.weight": (4,), "embed.weight": (1,)}),
        ({"*": 1, "layers.*": 4}, {"layers.1.attn.q.weight": (1,), "embed.weight": (1,)}),  # the first match counts
        ({"*.0.*": 2, "layers.*": 3, "*": 1}, {"layers.0.attn.q.weight": (2,), "layers.1.attn.q.weight": (3,)}),
        ({"embed.weight": (3, 2), "*": 1}, {"embed.weight": (2,)}),  # a matrix has the smaller of its two
        ({"embed.weight": [4, 4], "*": 1}, {"embed.weight": (4,)}),
        ({"conv.*": (5, 2, 1, 2), "*": 1}, {"conv.weight": (5, 2, 1, 2)}),
        (
            {"conv.*": [5, 4, 3, 2], "depth*": (6, 1, 3), "*": 1},
            {"conv.weight": (5, 4, 3, 2), "depthwise.weight": (6, 1, 3)},
        ),
    ],
)
def test_ranks_resolve_by_the_first_pattern_that_matches(rank: Any, expected: dict[str, tuple[int, ...]]) -> None:
    """Numbers and per-mode ranks reach the tensors their glob names; vectors and scalars have none."""
    resolved = resolve_ranks(rank, SHAPES)
    assert list(resolved) == list(SHAPES)
    assert resolved["layers.0.attn.q.bias"] == resolved["scale"] == ()
    assert {name: resolved[name] for name in expected} == expected


@pytest.mark.parametrize(
    "rank, message",
    [
        (5, r"rank: 5 exceeds 4, the most that 'embed.weight' of shape [11, 4] allows"),
        (
            {"layers.0.*": 5, "*": 1},
            r"rank: 5 exceeds 4, the most that 'layers.0.attn.q.weight' of shape [6, 4] allows",
        ),
        ({"depth*": 4, "*": 1}, r"rank: 4 exceeds 3, the most that 'depthwise.weight' of shape [6, 1, 3] allows"),
        ({"embed*": 1}, r"rank: no pattern matches 'layers.0.attn.q.weight'; add one, or '*'"),
        ({"*": 1, "attn": 2}, r"rank: no decomposed parameter matches 'attn'; there are embed.weight, "),
        ({}, r"rank: no pattern matches 'embed.weight'; add one, or '*'"),
        ({"conv*": (2, 2), "*": 1}, r"rank: expected 4 ranks of at most [5, 4, 3, 2] for 'conv.weight', got [2, 2]"),
        (
            {"conv*": (2, 2, 4, 1), "*": 1},
            r"rank: expected 4 ranks of at most [5, 4, 3, 2] for 'conv.weight', got [2, 2, 4,",
        ),
        ({"embed*": (2, 5), "*": 1}, r"rank: expected 2 ranks of at most [11, 4] for 'embed.weight', got [2, 5]"),
        ({"embed*": (2,), "*": 1}, r"rank: expected 2 ranks of at most [11, 4] for 'embed.weight', got [2]"),
        (0, r"rank: expected positive whole numbers for '*', got 0"),
        (-1, r"rank: expected positive whole numbers for '*', got -1"),
        ({"conv*": (2, 0, 1, 1), "*": 1}, r"rank: expected positive whole numbers for 'conv*', got (2, 0, 1, 1)"),
    ],
)
def test_ranks_a_tensor_does_not_allow_are_refused(rank: Any, message: str) -> None:
    """Each error is one line that names the argument, the tensor or the pattern, and the limit."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        resolve_ranks(rank, SHAPES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rank", [2.5, None, "8", {"*": 2.5}, {"*": "8"}, {"*": None}, {"*": (1.5, 2)}], ids=str)
def test_what_is_no_rank_is_refused_by_name(rank: Any) -> None:
    """A rank that is not a whole number, or several, is a ValueError that names the argument."""
    with pytest.raises(ValueError, match=r"rank: expected"):
        resolve_ranks(rank, MATRICES)


def test_the_largest_rank_allowed_is_allowed() -> None:
    """The limit that an error names works, for matrices and for tensors of higher order."""
    for shape in SHAPES.values():
        if len(shape) >= 2:
            largest = min(shape[0], shape[1:].numel())
            directions = Directions({"w": shape}, resolve_ranks(largest, {"w": shape}), 2)
            assert directions.tensors(0)["w"].shape == shape


# --- multiplying out --------------------------------------------------------------------------------------------


def draw(shape: tuple[int, ...], ranks: tuple[int, ...], K: int = 3) -> Directions:
    directions = Directions({"w": torch.Size(shape)}, {"w": ranks}, K, torch.Generator().manual_seed(0)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in directions.parameters():
            parameter.normal_(generator=generator)
    return directions


def product(directions: Directions) -> Tensor:
    """Multiply the one tensor out by an einsum over its own parameters: [K, *shape]."""
    (piece,) = directions.pieces
    if isinstance(piece, Whole):
        return piece.vector.view(-1, *directions.shapes["w"])
    if isinstance(piece, LowRank):
        return torch.einsum("kro,kri->koi", piece.left, piece.right)
    n = len(piece.modes)
    ranks, dims = "abcde"[:n], "vwxyz"[:n]
    terms = ",".join(f"k{r}{d}" for r, d in zip(ranks, dims, strict=True))
    return torch.einsum(f"k{ranks},{terms}->k{dims}", piece.core, *piece.modes)


KINDS = [
    ((), (), Whole),
    ((7,), (), Whole),
    ((5, 4), (3,), LowRank),
    ((1, 4), (1,), LowRank),
    ((5, 4, 3), (2, 3, 2), Tucker),
    ((5, 4, 3), (5, 1, 3), Tucker),
    ((5, 4, 3, 2), (3, 2, 2, 1), Tucker),
    ((6, 1, 3, 3), (4, 1, 2, 3), Tucker),
    ((3, 4, 2, 3, 2), (2, 3, 2, 1, 2), Tucker),
]


@pytest.mark.parametrize("shape, ranks, kind", KINDS)
def test_factors_multiply_out_to_the_tensor(shape: tuple[int, ...], ranks: tuple[int, ...], kind: type) -> None:
    """Orders 0 to 5: factors and tensors() are the einsum over core and modes, gradients included."""
    directions = draw(shape, ranks)
    assert isinstance(directions.pieces[0], kind)
    expected = product(directions)
    for k in range(3):
        assert directions.tensors(k)["w"].shape == shape
        assert_relative(directions.tensors(k)["w"], expected[k], 1e-12)
    left, right = directions.pieces[0].factors()
    assert left.shape[:2] == right.shape[:2] == (3, ranks[0] if ranks else 1)
    whole = torch.einsum("kro,kri->koi", left, right)
    assert_relative(whole, expected.reshape(3, shape[0] if shape else 1, -1), 1e-12)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = list(directions.parameters())
    grads = torch.autograd.grad((whole * upstream).sum(), parameters)
    expected_grads = torch.autograd.grad((expected * upstream.view_as(expected)).sum(), parameters)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_relative(grad, expected_grad, 1e-11)


@pytest.mark.parametrize("shape, ranks, kind", KINDS)
def test_norms_and_inner_products_are_those_of_the_tensors(
    shape: tuple[int, ...], ranks: tuple[int, ...], kind: type
) -> None:
    """squared_norm and gram, formed from factors, are V Vᵀ and its diagonal."""
    directions = draw(shape, ranks)
    flat = product(directions).reshape(3, -1)
    assert_relative(directions.gram(), flat @ flat.mT, 1e-12)
    assert_relative(directions.squared_norm(), flat.square().sum(1), 1e-12)


def everything(seed: int = 0, K: int = 4) -> Directions:
    ranks = resolve_ranks({"conv*": (3, 2, 2, 2), "*": 2}, SHAPES)
    return Directions(SHAPES, ranks, K, torch.Generator().manual_seed(seed)).double()


def flattened(directions: Directions) -> Tensor:
    """All K directions over all tensors together: [K, parameters]."""
    return torch.stack(
        [torch.cat([t.flatten() for t in directions.tensors(k).values()]) for k in range(directions.n_subnetworks)]
    )


def test_gram_is_over_all_tensors_together() -> None:
    """gram equals V Vᵀ of the directions over vectors, matrices and Tucker pieces together."""
    directions = everything()
    flat = flattened(directions)
    assert_relative(directions.gram(), flat @ flat.mT, 1e-12)


@pytest.mark.parametrize("small", [0, 256])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_grams_are_those_of_each_group(n_groups: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut out of the Gram matrix of all directions or taken one by one, each is V Vᵀ of its group alone."""
    monkeypatch.setattr(directions_module, "SMALL_GRAM", small)
    directions = everything()
    size = directions.n_subnetworks // n_groups
    grams = directions.grams(n_groups)
    assert grams.shape == (n_groups, size, size)
    for i, flat in enumerate(flattened(directions).split(size)):
        assert_relative(grams[i], flat @ flat.mT, 1e-12)
        assert_relative(directions.gram(slice(i * size, (i + 1) * size)), flat @ flat.mT, 1e-12)


@pytest.mark.parametrize("small", [0, 256])
def test_grams_are_differentiable(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of any group's entries is that of the multiplied-out directions, and reaches no other group."""
    monkeypatch.setattr(directions_module, "SMALL_GRAM", small)
    directions = everything()
    upstream = torch.randn(2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    second = flattened(directions)[2:]
    parameters = list(directions.parameters())
    found = torch.autograd.grad((directions.grams(2)[1] * upstream).sum(), parameters)
    expected = torch.autograd.grad(((second @ second.mT) * upstream).sum(), parameters)
    for grad, wanted in zip(found, expected, strict=True):
        assert_relative(grad, wanted, 1e-12)
        assert not grad[:2].any()


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_normalize_gives_unit_norm_and_keeps_the_direction(scale: float) -> None:
    """After normalize_ the norm over all tensors together is one, and only the length has changed."""
    directions = everything()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in directions.parameters():
            parameter.normal_(generator=generator).mul_(scale)
    before = flattened(directions)
    directions.normalize_()
    after = flattened(directions)
    assert_relative(after.norm(dim=1), torch.ones(4), 1e-12)
    if scale == 1:  # else tensors of different order are scaled differently
        assert_relative(after, before / before.norm(dim=1, keepdim=True), 1e-12)
    assert_relative(directions.squared_norm(), torch.ones(4), 1e-12)


def test_normalize_spreads_the_change_evenly_over_the_factors() -> None:
    """Every factor of a tensor takes the same share, so balanced factors stay balanced; a second changes nothing."""
    directions = draw((5, 4, 3), (2, 3, 2))
    before = [p.detach().clone() for p in directions.parameters()]
    directions.normalize_()
    shares = [
        (after.flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1))
        for after, old in zip(directions.parameters(), before, strict=True)
    ]
    for share in shares[1:]:
        assert_relative(share, shares[0], 1e-12)
    once = [p.detach().clone() for p in directions.parameters()]
    directions.normalize_()
    for twice, first in zip(directions.parameters(), once, strict=True):
        assert_relative(twice, first, 1e-12)


def test_a_direction_of_zeros_stays_finite() -> None:
    """Normalising a zero direction leaves zeros, not NaN."""
    directions = everything()
    with torch.no_grad():
        for parameter in directions.parameters():
            parameter[1] = 0
    directions.normalize_()
    flat = flattened(directions)
    assert torch.equal(flat[1], torch.zeros_like(flat[1]))
    assert_relative(flat[[0, 2, 3]].norm(dim=1), torch.ones(3), 1e-12)


def test_the_start_is_of_unit_norm_spread_evenly_and_drawn_from_the_generator() -> None:
    """A new set has unit norm, an equal share in every tensor; the same generator state gives the same bits."""
    first, again, other = everything(0), everything(0), everything(1)
    shares = torch.stack([torch.stack([t.square().sum() for t in first.tensors(k).values()]) for k in range(4)])
    assert_relative(shares, torch.full((4, len(SHAPES)), 1 / len(SHAPES)), 1e-5)  # drawn in float32
    assert torch.equal(flattened(first), flattened(again))
    assert not torch.equal(flattened(first), flattened(other))
    state = torch.get_rng_state()
    everything()
    assert torch.equal(torch.get_rng_state(), state)


# --- Decomposition ----------------------------------------------------------------------------------------------


def test_subnetworks_have_the_parameters_shapes_and_unit_norm() -> None:
    """subnetwork(i) is {name: tensor of the parameter's shape}, of unit norm together, detached, the decoder's."""
    d = Decomposition(SHAPES, 3, 2).double()
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    d.normalize_()
    assert d.n_subnetworks == 3
    assert d.parameter_names == list(SHAPES)
    for i in range(3):
        subnetwork = d.subnetwork(i)
        assert {name: t.shape for name, t in subnetwork.items()} == SHAPES
        assert not any(t.requires_grad for t in subnetwork.values())
        assert_relative(torch.cat([t.flatten() for t in subnetwork.values()]).norm(), 1.0, 1e-12)
        assert torch.equal(torch.cat([t.flatten() for t in subnetwork.values()]), flattened(d.decoder)[i])


def test_a_subnetwork_is_a_copy() -> None:
    """Writing into a returned subnetwork does not change the decomposition."""
    d = Decomposition({"a": torch.Size([3]), "b": torch.Size([3, 2])}, 2, 1)
    before = flattened(d.decoder)
    for tensor in d.subnetwork(1).values():
        tensor.zero_()
    assert torch.equal(flattened(d.decoder), before)


@pytest.mark.parametrize("index", [-4, 3, 100])
def test_a_subnetwork_that_is_not_there_is_refused(index: int) -> None:
    """An index out of range names itself and the limits; negative ones count from the end."""
    with pytest.raises(IndexError, match=rf"index: expected -3 <= index < 3, got {index}"):
        Decomposition(SHAPES, 3, 2).subnetwork(index)


def test_the_encoder_starts_as_a_copy_of_the_decoder() -> None:
    """At the start both sides hold the same bits, in tensors of their own."""
    d = Decomposition(SHAPES, 3, 2)
    assert torch.equal(flattened(d.encoder), flattened(d.decoder))
    with torch.no_grad():
        next(d.encoder.parameters()).zero_()
    assert not torch.equal(flattened(d.encoder), flattened(d.decoder))


def test_a_decomposition_of_nothing_is_refused() -> None:
    """K below one is refused by name."""
    with pytest.raises(ValueError, match=r"n_subnetworks: expected at least 1, got 0"):
        Decomposition(SHAPES, 0, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_parts", [1, 2, 3])
def test_side_by_side_and_apart_again(n_parts: int, dtype: torch.dtype) -> None:
    """Laid side by side, decompositions keep their bits, encoder and decoder; each part is had back as it was."""
    rank = {"conv*": (3, 2, 3, 1), "*": 2}
    parts = [
        Decomposition(SHAPES, 3, rank, {"seed": i}, torch.Generator().manual_seed(i)).to(dtype) for i in range(n_parts)
    ]
    for i, part in enumerate(parts):  # encoder and decoder differ
        with torch.no_grad():
            for parameter in part.encoder.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(10 + i))
    whole = Decomposition.side_by_side(parts)
    assert whole.n_subnetworks == whole.encoder.n_subnetworks == 3 * n_parts
    assert whole.settings == {"seed": 0}
    assert (whole.shapes, whole.ranks) == (parts[0].shapes, parts[0].ranks)
    for i, part in enumerate(parts):
        again = whole.part(i, n_parts)
        assert again.n_subnetworks == 3
        assert again.ranks == part.ranks
        assert list(again.state_dict()) == list(part.state_dict())
        ours, theirs = dict(again.named_parameters()), dict(part.named_parameters())
        for name, tensor in ours.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, theirs[name])
        for k in range(3):
            found, expected = whole.subnetwork(3 * i + k), part.subnetwork(k)
            assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_parts_are_copies() -> None:
    """Writing into the whole changes neither what it was made of nor a part that was taken from it; both train."""
    parts = [Decomposition(SHAPES, 2, 1, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    before = [flattened(part.decoder).detach().clone() for part in parts]
    whole = Decomposition.side_by_side(parts)
    second = whole.part(1, 2)
    assert all(parameter.requires_grad for d in (whole, second) for parameter in d.parameters())
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.zero_()
    for d, expected in ((parts[0], before[0]), (parts[1], before[1]), (second, before[1])):
        assert torch.equal(flattened(d.decoder), expected)
