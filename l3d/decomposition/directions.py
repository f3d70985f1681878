"""Low-rank directions in parameter space: one piece per parameter tensor, K directions side by side.

A tensor of order two or more is held as factors: a matrix as left [K, R, O] and right [K, R, I], a tensor of
higher order as a Tucker product, core [K, r1..rn] with one factor [K, r_i, d_i] per mode. Both read as

    V_k = Σ_r left[k, r] (x) right[k, r]          a matrix [d0, rest]

once the core and all modes but the first are contracted into `right`. Vectors and scalars are stored whole.
"""

import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import l3d_kernels as lk
from l3d.gradients.factors import matrix_shape
from l3d.gradients.model import exact_pattern
from l3d_kernels import cpu

# Up to so many directions, the Gram matrices of groups are cut out of that of all: one operation beats many small ones.
SMALL_GRAM = 256

DEFAULT_RANK = 8

Rank = int | Mapping[str, int | Sequence[int]]


Factory = Mapping[str, Any]  # dtype and device of new tensors, where they are not torch's defaults
TORCH_DEFAULTS: Factory = MappingProxyType({})
FLOAT32_CPU: Factory = {"dtype": torch.float32, "device": "cpu"}  # for draws, which no default of torch's may change


def _empty(factory: Factory, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, **factory))


class Whole(nn.Module):
    """A vector (or scalar) per subnetwork: [K, P]."""

    def __init__(self, n_subnetworks: int, shape: torch.Size, factory: Factory) -> None:
        super().__init__()
        self.vector = _empty(factory, n_subnetworks, shape.numel())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Read as matrices of one column: left [K, 1, P], right [K, 1, 1]."""
        return self.vector[:, None], self.vector.new_ones(len(self.vector), 1, 1)


class LowRank(nn.Module):
    """A matrix of rank R per subnetwork: left [K, R, O], right [K, R, I]."""

    def __init__(self, n_subnetworks: int, shape: torch.Size, rank: int, factory: Factory) -> None:
        super().__init__()
        self.left = _empty(factory, n_subnetworks, rank, shape[0])
        self.right = _empty(factory, n_subnetworks, rank, shape[1])

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (left [K, R, O], right [K, R, I])."""
        return self.left, self.right


class Tucker(nn.Module):
    """A tensor of order n >= 3 per subnetwork: core [K, r1..rn] and one factor [K, r_i, d_i] per mode."""

    def __init__(self, n_subnetworks: int, shape: torch.Size, ranks: Sequence[int], factory: Factory) -> None:
        super().__init__()
        self.core = _empty(factory, n_subnetworks, *ranks)
        self.modes = nn.ParameterList(_empty(factory, n_subnetworks, r, d) for r, d in zip(ranks, shape, strict=True))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Contract all but the first mode into `right`: (left [K, r1, d0], right [K, r1, rest])."""
        right = self.core  # [K, r1, .., rn]; contract the last mode, and rotate the result to the front of the rest
        for mode in list(self.modes)[:0:-1]:
            contracted = right.flatten(1, -2) @ mode  # [K, r1*..., d]
            right = contracted.unflatten(1, right.shape[1:-1]).movedim(-1, 2)
        return self.modes[0], right.flatten(2)


Piece = Whole | LowRank | Tucker


def _piece(n_subnetworks: int, shape: torch.Size, ranks: tuple[int, ...], factory: Factory) -> Piece:
    if not ranks:
        return Whole(n_subnetworks, shape, factory)
    if len(shape) == 2:
        return LowRank(n_subnetworks, shape, ranks[0], factory)
    return Tucker(n_subnetworks, shape, ranks, factory)


def resolve_ranks(rank: Rank, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    """Return the ranks of every tensor: () for vectors, (R,) for matrices, one per mode for higher orders.

    Args:
        rank: one number for all, or {glob: number or one per mode}; the first pattern that matches counts, and
            every tensor of order two or more must be matched. For higher orders one number is a ceiling: modes
            that are smaller (a kernel of 3) get their size.
        shapes: of the parameters.

    Raises ValueError for a rank that a tensor does not allow, naming it.
    """
    resolved: dict[str, tuple[int, ...]] = {}
    if not isinstance(rank, (int, Mapping)) or isinstance(rank, bool):
        raise ValueError(f"rank: expected a whole number or {{glob: number or numbers}}, got {rank!r}")
    patterns = {"*": rank} if isinstance(rank, int) else dict(rank)
    literal = {
        exact_pattern(name): name for name in shapes
    }  # of these each fits one name: time grows with their number
    at = {pattern: i for i, pattern in enumerate(patterns)}
    globs = [pattern for pattern in patterns if pattern not in literal]
    for pattern, wanted in patterns.items():
        if not isinstance(pattern, str):
            raise ValueError(f"rank: expected texts as patterns of names, got {pattern!r}")
        numbers = wanted if isinstance(wanted, (list, tuple)) else [wanted]
        if not numbers or not all(type(number) is int and number >= 1 for number in numbers):
            raise ValueError(f"rank: expected positive whole numbers for {pattern!r}, got {wanted!r}")
        if pattern not in literal and not any(fnmatch.fnmatchcase(name, pattern) for name in shapes):
            raise ValueError(f"rank: no decomposed parameter matches {pattern!r}; there are {', '.join(shapes)}")
    for name, shape in shapes.items():
        if len(shape) < 2:
            resolved[name] = ()
            continue
        fitting = [p for p in (exact_pattern(name),) if p in at]
        fitting += itertools.islice((p for p in globs if fnmatch.fnmatchcase(name, p)), 1)
        if not fitting:
            raise ValueError(f"rank: no pattern matches {name!r}; add one, or '*'")
        resolved[name] = _ranks_of(name, shape, patterns[min(fitting, key=at.__getitem__)])
    return resolved


def default_ranks(shapes: Mapping[str, torch.Size]) -> Rank:
    """Return `DEFAULT_RANK`, or where a tensor allows less, that tensor by tensor, as `resolve_ranks` takes it.

    >>> default_ranks({"narrow": torch.Size([3, 20]), "wide": torch.Size([9, 9]), "bias": torch.Size([9])})
    {'narrow': 3, 'wide': 8}
    """
    if all(min(matrix_shape(shape)) >= DEFAULT_RANK for shape in shapes.values() if len(shape) > 1):
        return DEFAULT_RANK
    capped = {name: [min(DEFAULT_RANK, d) for d in shape] for name, shape in shapes.items() if len(shape) > 1}
    return {exact_pattern(name): min(each) if len(each) == 2 else each for name, each in capped.items()}


def _ranks_of(name: str, shape: torch.Size, wanted: int | Sequence[int]) -> tuple[int, ...]:
    largest = min(matrix_shape(shape))
    ranks = (wanted,) if isinstance(wanted, int) else tuple(wanted)
    if isinstance(wanted, int):
        if wanted > largest:
            raise ValueError(
                f"rank: {wanted} exceeds {largest}, the most that {name!r} of shape {list(shape)} allows; "
                f"pass a smaller rank, or {{glob: rank}} with at most that for it"
            )
        return ranks if len(shape) == 2 else tuple(min(wanted, d) for d in shape)
    if len(ranks) != len(shape) or any(r > d for r, d in zip(ranks, shape, strict=True)):
        raise ValueError(f"rank: expected {len(shape)} ranks of at most {list(shape)} for {name!r}, got {list(ranks)}")
    return (min(ranks),) if len(shape) == 2 else ranks


class Directions(nn.Module):
    """K directions over all chosen tensors; starts with random entries and unit norm.

    Args:
        shapes: of the parameters, by name.
        ranks: of the parameters, as `resolve_ranks` gives them.
        n_subnetworks: K.
        generator: draws the start.
        columns: which of the K to hold, where others hold the rest; they start as they would among all.
        factory: dtype and device, such as `FLOAT32_CPU`; on "meta" no start is drawn.
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        ranks: Mapping[str, tuple[int, ...]],
        n_subnetworks: int,
        generator: torch.Generator | None = None,
        columns: slice | None = None,
        factory: Factory = TORCH_DEFAULTS,
    ) -> None:
        super().__init__()
        self.shapes, self._ranks = dict(shapes), dict(ranks)
        self.n_subnetworks = n_subnetworks if columns is None else columns.stop - columns.start
        self.pieces = nn.ModuleList()
        norms: list[Tensor] = []
        with torch.no_grad():
            for name, shape in shapes.items():
                piece = _piece(self.n_subnetworks, shape, ranks[name], factory)
                self.pieces.append(piece)
                if all(parameter.is_meta for parameter in piece.parameters()):
                    continue  # still to be filled
                # one tensor's start at a time is made for all, so that a share is what it would be among all
                whole = piece if columns is None else _piece(n_subnetworks, shape, ranks[name], factory)
                for parameter in whole.parameters():
                    parameter.normal_(generator=generator)
                _rescale([whole], _squared_norm(whole))  # every tensor starts with the same share of the norm
                norms.append(_squared_norm(whole))
                if columns is not None:
                    for parameter, drawn in zip(piece.parameters(), whole.parameters(), strict=True):
                        parameter.copy_(drawn[columns])
            if norms:
                _rescale(self.pieces, torch.stack(norms).sum(0)[slice(None) if columns is None else columns])

    def items(self) -> list[tuple[str, Piece]]:
        """Pair every parameter's name with its piece."""
        return list(zip(self.shapes, self.pieces, strict=True))  # type: ignore[arg-type]

    def squared_norm(self) -> Tensor:
        """Return ‖V_k‖² over all tensors together: [K]."""
        return torch.stack([_squared_norm(piece) for piece in self.pieces]).sum(0)

    @torch.no_grad()
    def normalize_(self) -> None:
        """Rescale every direction to unit norm, the factor spread evenly over the factors of each tensor."""
        _rescale(self.pieces, self.squared_norm())

    @torch.no_grad()
    def normalize_by(self, grams: Sequence[Tensor], moves: Tensor, backend: str = "auto") -> None:
        """Rescale as `normalize_` does the directions whose `moves` [K] are not 0, by their tensors' Gram matrices.

        `grams` are `lk.adam_step`'s [K, R, R], in the order of the parameters.
        """
        parameters, shares = _factors_of(self.pieces)
        lk.rescale(parameters, self.squared_norm_of(grams), shares, moves, backend=backend)

    def squared_norm_of(self, grams: Sequence[Tensor]) -> Tensor:
        """Return ‖V_k‖² [K] over all tensors together, from the Gram matrices [K, R, R] of their factors."""
        rest = iter(grams)
        sides: tuple[list[Tensor], list[Tensor]] = [], []  # whose products are summed: [K, R²] of every tensor
        alone: list[Tensor] = []  # [K, 1]
        for piece in self.pieces:
            own = [next(rest) for _ in piece.parameters()]
            if isinstance(piece, Whole):
                alone.append(own[0][:, 0])
                continue
            left, right = (own[1], _core_gram(piece.core.to(own[0]), own[2:])) if isinstance(piece, Tucker) else own
            sides[0].append(left.flatten(1))
            sides[1].append(right.flatten(1))
        products = [torch.cat(sides[0], 1) * torch.cat(sides[1], 1)] if sides[0] else []
        every = products + alone
        return (torch.cat(every, 1) if len(every) > 1 else every[0]).sum(1)

    def gram(self, chosen: slice = slice(None), backend: str = "auto") -> Tensor:
        """Return <V_k, V_j> over all tensors together, for all directions or some: [K, K]."""
        every, grams = list(self.factors(chosen)), []
        if backend == "triton" or every[0][0].device.type != "cpu":  # kernels take many matrices in one launch
            matrices = [factors for factors in every if len(factors) == 2]
            grams = [lk.gram(*zip(*matrices, strict=True), backend=backend)] if matrices else []
            every = [factors for factors in every if len(factors) == 1]
        grams += [f[0] @ f[0].mT if len(f) == 1 else lk.gram(*f, backend=backend) for f in every]
        return reduce(torch.add, grams)

    def inner(self, other: "Directions") -> Tensor:
        """Return <V_k, U_j> with directions U of the same tensors, over all together: [K, J]."""
        like = next(self.parameters())
        return inner_products(self.factors(), (tuple(each.to(like) for each in found) for found in other.factors()))

    def factors(self, chosen: slice | Tensor | int = slice(None)) -> Iterator[tuple[Tensor, ...]]:
        """Yield each tensor's factors of the chosen directions: (left, right), or of a vector (vector [K, P],)."""
        for _, piece in self.items():
            found = (piece.vector,) if isinstance(piece, Whole) else piece.factors()
            yield (
                found if isinstance(chosen, slice) and chosen == slice(None) else tuple(each[chosen] for each in found)
            )

    def sizes(self) -> list[tuple[int, int, int]]:
        """Return (R, O, I) of every tensor read as matrices, a vector as one column."""
        ranks = self.ranks().values()
        matrices = (matrix_shape(shape) if len(shape) > 1 else (shape.numel(), 1) for shape in self.shapes.values())
        return [(rank[0] if rank else 1, *matrix) for rank, matrix in zip(ranks, matrices, strict=True)]

    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Return the ranks of every tensor, as `resolve_ranks` gives them."""
        return dict(self._ranks)

    def grams(self, n_groups: int, backend: str = "auto") -> Tensor:
        """Return `gram` of each of so many equal groups of neighbouring directions: [groups, K, K]."""
        size = self.n_subnetworks // n_groups
        if n_groups == 1:
            return self.gram(backend=backend)[None]
        if self.n_subnetworks > SMALL_GRAM:
            return torch.stack([self.gram(slice(i * size, (i + 1) * size), backend) for i in range(n_groups)])
        blocks = self.gram(backend=backend).view(n_groups, size, n_groups, size)
        return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Multiply one direction out: {name: tensor of the parameter's shape}."""
        every = ((name, *piece.factors()) for name, piece in self.items())
        return {name: (left[index].mT @ right[index]).reshape(self.shapes[name]) for name, left, right in every}


def inner_products(
    first: Iterable[tuple[Tensor, ...]], second: Iterable[tuple[Tensor, ...]], backend: str = "auto"
) -> Tensor:
    """Return <V_j, U_k> of two sets of directions, given by `Directions.factors`, over all tensors together: [J, K]."""

    def product(v: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> Tensor:
        if len(v) == 1:
            return v[0] @ u[0].mT
        return lk.project(v[1], v[0], *u, backend=backend)  # a direction is a gradient whose positions are its ranks

    return reduce(torch.add, map(product, first, second))


def _squared_norm(piece: nn.Module) -> Tensor:
    """Return the squared norms of one tensor's directions: [K]."""
    if isinstance(piece, Whole):
        return piece.vector.square().sum(1)
    left, right = piece.factors()  # type: ignore[operator]
    if left.shape[1] == 1:
        return (torch.linalg.vector_norm(left, dim=(1, 2)) * torch.linalg.vector_norm(right, dim=(1, 2))).square()
    return ((left @ left.mT) * (right @ right.mT)).sum((1, 2))


def _core_gram(core: Tensor, grams: Sequence[Tensor]) -> Tensor:
    """Return the Gram matrix of `right` [K, r1, r1], as `Tucker.factors` contracts it, from those of modes 2 to n."""
    contracted = core
    for axis, gram in enumerate(grams, 2):
        moved = contracted.movedim(axis, -1)
        contracted = (moved.flatten(1, -2) @ gram).view(moved.shape).movedim(-1, axis)
    return contracted.flatten(2) @ core.flatten(2).mT


def _factors_of(pieces: Iterable[nn.Module]) -> tuple[list[Tensor], list[int]]:
    """Return all tensors of the pieces, and by how many each piece's norm is shared."""
    factors: list[Tensor] = []
    shares: list[int] = []
    for piece in pieces:
        # of a module without others its own, at once: walking modules takes longer than scaling a small one
        parameters: list[Any] = list(piece.parameters() if piece._modules else piece._parameters.values())
        factors += parameters
        shares += [len(parameters)] * len(parameters)
    return factors, shares


def _rescale(pieces: Iterable[nn.Module], squared: Tensor) -> None:
    """Divide some tensors' directions by sqrt(squared) [K], an equal share per factor."""
    factors, shares = _factors_of(pieces)
    cpu.rescale(factors, squared, shares)
