"""Define the data format of per-sample gradients: short sums of outer products, or small dense arrays.

A parameter stored as a tensor [d0, d1, ...] is read as a matrix [d0, d1*...]. The gradient of sample s is the sum of
its parts. A part is one of

* `Rows`: the layer inputs x and output gradients dy, G_s = Σ_t dy[s, t] ⊗ x[s // (S // B), t], not multiplied out;
* `Dense`: the gradient itself, for vectors and wherever it is smaller than its factors.

A parameter on which the output does not depend has no parts. Letters: B sequences, S samples (sequence-major),
T positions that share the weight, I and O the widths of x and dy.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels import splitting


class Rows(NamedTuple):
    """A gradient as layer inputs and output gradients, G_s = Σ_t dy[s, t] ⊗ x[s // (S // B), t], or its transpose."""

    x: Tensor  # [B, T, I], or int64 [B, T]: indices of one-hot rows
    dy: Tensor  # [S, T, O]
    x_axis: int  # 1: x runs along the stored matrix's columns (Linear); 0: along its rows (Conv1D of GPT-2, Embedding)

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        """Multiply out: [S, *shape] for a parameter stored as the matrix `shape`."""
        grad = splitting.outer(self.x, self.dy, shape[self.x_axis])
        return grad if self.x_axis == 1 else grad.mT

    def squared_norm(self, backend: str = "auto") -> Tensor:
        """Return ‖G_s‖²: [S]."""
        return lk.squared_gradient_norm(self.x, self.dy, backend=backend)

    def side(self, axis: int) -> Tensor:
        """Return each sample's rows along the stored matrix's `axis`: [S, T, D], or indices [S, T]."""
        if axis != self.x_axis:
            return self.dy
        return self.x.repeat_interleave(self.dy.shape[0] // self.x.shape[0], 0)

    def select(self, samples: Tensor) -> "Rows":
        """Return the given samples, int64 [n]; each then has its own copy of its sequence's rows of x."""
        return Rows(self.x[samples // (self.dy.shape[0] // self.x.shape[0])], self.dy[samples], self.x_axis)

    def to(self, like: Tensor) -> "Rows":
        """Move to the device of `like`, and the floating-point tensors to its dtype."""
        x = self.x.to(like) if self.x.is_floating_point() else self.x.to(like.device)
        return Rows(x, self.dy.to(like), self.x_axis)


class Dense(NamedTuple):
    """A gradient in full, one tensor per sample."""

    grad: Tensor  # [S, *shape of the parameter]

    def materialize(self, shape: tuple[int, int]) -> Tensor:
        """Return the gradient as matrices: [S, *shape]."""
        return self.grad.reshape(-1, *shape)

    def squared_norm(self, backend: str = "auto") -> Tensor:
        """Return ‖G_s‖²: [S]. `backend` has no effect: there is no kernel for it."""
        return self.grad.reshape(self.grad.shape[0], -1).square().sum(1)

    def select(self, samples: Tensor) -> "Dense":
        """Return the given samples, int64 [n]."""
        return Dense(self.grad[samples])

    def to(self, like: Tensor) -> "Dense":
        """Move to the device and dtype of `like`."""
        return Dense(self.grad.to(like))


Part = Rows | Dense


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Read a parameter's shape as a matrix: axis 0, and all other axes. A scalar or vector is a single column."""
    return (shape[0] if shape else 1), shape[1:].numel()


@dataclass(repr=False)
class Gradients:
    """Per-sample gradients of the chosen parameters, for S samples.

    Attributes:
        parts: by parameter, the parts whose sum is its gradient; none if it is zero.
        shapes: by parameter, its shape.
        n_samples: S.
        dtype: of the gradients and of all sums over them; the factors may be held in a narrower one.
        device: of the factors.
    """

    parts: dict[str, list[Part]]
    shapes: dict[str, torch.Size]
    n_samples: int
    dtype: torch.dtype
    device: torch.device
    _matrices: dict[str, Tensor] = field(default_factory=dict)
    _flat: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    _within: tuple["Gradients", int, int] | None = None  # (whole, start, stop) if `between` cut these samples

    def __repr__(self) -> str:
        """Describe the gradients without their numbers: one line in all, then one line per parameter."""
        first = (
            f"Gradients: {self.n_samples} samples, {len(self.shapes)} tensors, {self.dtype}, {self.device}, "
            f"{self.nbytes()} bytes"
        )
        held = {name: " + ".join(map(_describe, self.parts[name])) or "zero" for name in self.shapes}
        return "\n".join([first, *(f"  {name} {list(shape)}: {held[name]}" for name, shape in self.shapes.items())])

    def matrix(self, name: str) -> Tensor:
        """Return one parameter's gradients multiplied out as matrices [S, d0, d1*...]; the result is cached."""
        if name not in self._matrices:
            shape = matrix_shape(self.shapes[name])
            if self.parts[name]:
                self._matrices[name] = reduce(torch.add, (part.materialize(shape) for part in self.widened(name)))
            else:
                self._matrices[name] = self._like().new_zeros(self.n_samples, *shape)
        return self._matrices[name]

    def flat(self, names: Sequence[str]) -> Tensor:
        """Return all gradients multiplied out, in the order of `names`: [S, all entries]; the result is cached."""
        key = tuple(names)
        if key not in self._flat:
            n_entries = sum(shape.numel() for shape in self.shapes.values())
            if self._within is not None and self._within[0].n_samples * n_entries <= splitting.CHUNK:
                whole, start, stop = self._within
                self._flat[key] = whole.flat(key)[start:stop]  # small: multiply out once for all slices of the whole
            else:
                self._flat[key] = torch.cat([self.matrix(name).flatten(1) for name in key], 1)
        return self._flat[key]

    def fits_whole(self, name: str) -> bool:
        """Tell whether one parameter's gradients, multiplied out, are no larger than their factors, or small."""
        held = sum(tensor.numel() for owner, tensor in self.tensors() if owner == name)
        return self.n_samples * self.shapes[name].numel() <= max(held, splitting.CHUNK)

    def materialize(self) -> dict[str, Tensor]:
        """Multiply everything out: {name: [S, *shape]}. Training uses `matrix` and `flat`, which keep results."""
        return {name: self.matrix(name).reshape(-1, *shape) for name, shape in self.shapes.items()}

    def exponent(self) -> int:
        """Return the e for which 2^e times these gradients, and their squares, lie well inside float32's range.

        0 where they do already: where the largest product of two factors' entries is within 2^±27, or all are zero.
        """
        largest = 0.0
        for parts in self.parts.values():
            for part in parts:
                tensors = [part.grad] if isinstance(part, Dense) else [part.dy, part.x]
                tops = [float(t.abs().max()) for t in tensors if t.is_floating_point() and t.numel()]
                largest = max(largest, math.prod(tops))
        e = 0 if largest == 0 or math.isinf(largest) else -math.frexp(largest)[1]
        return 0 if abs(e) <= 27 else max(-126, min(e, 126))

    def in_range(self) -> tuple["Gradients", int]:
        """Return (2^e times these gradients, e) with e = `exponent()`: exact, and the same object where e is 0."""
        e = self.exponent()
        if e == 0:
            return self, 0

        def scaled(part: Part) -> Part:
            if isinstance(part, Dense):
                return Dense(part.grad * 2.0**e)
            return part._replace(dy=part.dy * 2.0**e)

        return self.changed(scaled), e

    def squared_norm(self, backend: str = "auto") -> Tensor:
        """Return ‖g_s‖² over all parameters together: [S]; in float64 where the gradients' dtype could not hold it."""
        gradients, e = self.in_range()
        norms = gradients.squared_norm_in_range(backend)
        return norms if e == 0 else torch.ldexp(norms.double(), torch.tensor(-2 * e, device="cpu"))

    def squared_norm_in_range(self, backend: str = "auto") -> Tensor:
        """Return what `squared_norm` does, without a look at the gradients' size: for those whose exponent is 0."""
        names, norms = [name for name in self.shapes if self.parts[name]], []
        if backend == "triton" or self.device.type != "cpu":  # kernels take many parameters in one launch
            held = {name: self.widened(name) for name in names if name not in self._matrices}
            rows = {name: parts[0] for name, parts in held.items() if len(parts) == 1 and isinstance(parts[0], Rows)}
            if rows:
                x, dy, _ = zip(*rows.values(), strict=True)
                norms.append(lk.squared_gradient_norm(x, dy, backend=backend))
            names = [name for name in names if name not in rows]
        norms += [self._squared_norm_of(name, backend) for name in names]
        return reduce(torch.add, norms) if norms else self._like().new_zeros(self.n_samples)

    def _squared_norm_of(self, name: str, backend: str) -> Tensor:
        """Return ‖G_s‖² of one parameter, [S], from its matrices if they are cached, else from its parts."""
        if name in self._matrices:
            return torch.linalg.vector_norm(self._matrices[name], dim=(1, 2)).square()  # without a tensor of squares
        parts = self.widened(name)
        if any(isinstance(part, Dense) for part in parts) and len(parts) > 1:
            return self.matrix(name).square().sum((1, 2))
        norms = []
        for i, part in enumerate(parts):
            norms += [part.squared_norm(backend), *(2 * _inner(part, other) for other in parts[i + 1 :])]
        return reduce(torch.add, norms)

    def select(self, samples: Tensor) -> "Gradients":
        """Return the gradients of the given samples, int64 [n], in that order; repeats are allowed."""
        samples, like = samples.to(self.device), self._like()
        return self.changed(lambda part: part.select(samples).to(like), n_samples=len(samples))

    def held_in(self, dtype: torch.dtype) -> "Gradients":
        """Return these gradients with factors in a narrower dtype; each is widened again where it is multiplied."""
        like = self._like().to(dtype)
        return self.changed(lambda part: part.to(like))

    def widened(self, name: str) -> list[Part]:
        """Return one parameter's parts in the gradients' dtype."""
        like = self._like()
        return [part.to(like) for part in self.parts[name]]

    def _like(self) -> Tensor:
        """Return an empty tensor of the gradients' dtype and device."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def changed(self, change: Callable[[Part], Part], **others: Any) -> "Gradients":
        """Return gradients with `change` applied to every part, and with other attributes where given."""
        parts = {name: [change(part) for part in parts] for name, parts in self.parts.items()}
        same: dict[str, Any] = {"n_samples": self.n_samples, "dtype": self.dtype, "device": self.device}
        return Gradients(parts, self.shapes, **(same | others))

    def per_sequence(self) -> int:
        """Return the number of samples per sequence, S / B; 1 if no part has rows."""
        rows = [part for parts in self.parts.values() for part in parts if isinstance(part, Rows) and len(part.x)]
        return max((part.dy.shape[0] // part.x.shape[0] for part in rows), default=1)

    def between(self, start: int, stop: int) -> "Gradients":
        """Return samples start to stop as views, without a copy; both must be multiples of `per_sequence()`."""

        def cut(part: Part) -> Part:
            if isinstance(part, Dense):
                return Dense(part.grad[start:stop])
            per_sequence = part.dy.shape[0] // part.x.shape[0]
            return Rows(part.x[start // per_sequence : stop // per_sequence], part.dy[start:stop], part.x_axis)

        return self.changed(cut, n_samples=stop - start, _within=(self, start, stop))

    def to(self, like: Tensor) -> "Gradients":
        """Move to the device and floating-point dtype of `like`; returns self if nothing changes."""
        if (like.dtype, like.device) == (self.dtype, self.device):
            return self
        return self.changed(lambda part: part.to(like), dtype=like.dtype, device=like.device)

    def nbytes(self) -> int:
        """Count the bytes of the factors, without cached matrices."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (parameter name, tensor) for the tensors of all parts."""
        for name, parts in self.parts.items():
            for part in parts:
                yield from ((name, tensor) for tensor in part if isinstance(tensor, Tensor))


Place = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


def place_of(tensor: Tensor) -> Place:
    """Identify a tensor by the memory it views: layers with the same input (q, k and v) share one tensor."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def concatenate(batches: Sequence[Gradients]) -> Gradients:
    """Append the samples of several batches of the same parameters.

    Raises ValueError if the parts of a parameter differ in kind between batches.
    """
    first = batches[0]
    if len(batches) == 1:
        return first
    joined: dict[tuple[Place, ...], Tensor] = {}  # by the tensors joined: one that parts share is joined once

    def append(tensors: tuple[Tensor, ...]) -> Tensor:
        key = tuple(map(place_of, tensors))
        if key not in joined:
            joined[key] = torch.cat(tensors)
        return joined[key]

    parts: dict[str, list[Part]] = {}
    for name in first.shapes:
        parts[name] = []
        for each in zip(*(batch.parts[name] for batch in batches), strict=True):
            if len({_kind(part) for part in each}) > 1:
                raise ValueError(f"data: the gradients of {name!r} change their form between rows of a batch")
            fields = zip(*each, strict=True)  # x, dy and x_axis of rows, or grad
            parts[name].append(type(each[0])(*(append(f) if isinstance(f[0], Tensor) else f[0] for f in fields)))
    return Gradients(parts, first.shapes, sum(batch.n_samples for batch in batches), first.dtype, first.device)


def _describe(part: Part) -> str:
    """Say how a part is held, for `Gradients.__repr__`."""
    if isinstance(part, Dense):
        return "dense"
    return f"{'rows' if part.x.is_floating_point() else 'indices'} T={part.dy.shape[1]}"


def _kind(part: Part) -> tuple[object, ...]:
    """Return the properties in which parts must agree to be appended along their samples."""
    if isinstance(part, Dense):
        return ("dense",)
    return part.x_axis, part.x.dtype, part.x.shape[1:], part.dy.shape[1:], part.dy.shape[0] // part.x.shape[0]


def combine(parts: list[Part]) -> list[Part]:
    """Merge parts of one kind: rows are appended along T, dense arrays are added."""
    alike: dict[object, list[Any]] = {}  # by kind: None for dense arrays; of rows the axis, whether indices, and B
    for part in parts:
        kind = (part.x_axis, part.x.is_floating_point(), len(part.x)) if isinstance(part, Rows) else None
        alike.setdefault(kind, []).append(part)
    return [_sum(kind) for kind in alike.values()]


def _sum(parts: list[Any]) -> Part:
    """Return the sum of parts of one kind as one part."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Dense):
        return Dense(reduce(torch.add, (part.grad for part in parts)))
    x, dy = torch.cat([part.x for part in parts], 1), torch.cat([part.dy for part in parts], 1)
    return Rows(x, dy, parts[0].x_axis)


def compact(part: Part, shape: torch.Size) -> Part:
    """Multiply rows out if the gradient is no larger than its factors, as for convolutions, where T is large."""
    if isinstance(part, Dense) or not part.x.is_floating_point():
        return part
    if part.dy.shape[0] * shape.numel() > part.x.numel() + part.dy.numel():
        return part
    return Dense(part.materialize(matrix_shape(shape)).reshape(-1, *shape))


def _inner(a: Part, b: Part) -> Tensor:
    """Inner product of two row parts of one parameter, Σ_tt' (a0_t · b0_t')(a1_t · b1_t'): [S]."""
    assert isinstance(a, Rows)
    assert isinstance(b, Rows)
    return (_side_inner(a.side(0), b.side(0)) * _side_inner(a.side(1), b.side(1))).sum((1, 2))


def _side_inner(u: Tensor, v: Tensor) -> Tensor:
    """Inner products of two sets of rows, [S, T, D] or indices [S, T]: [S, T, T']."""
    if u.is_floating_point() and v.is_floating_point():
        return u @ v.mT
    if u.is_floating_point():
        return _side_inner(v, u).mT
    if v.is_floating_point():  # a one-hot row selects an entry: v[s, t', u[s, t]]
        return v.gather(2, u[:, None, :].expand(-1, v.shape[1], -1)).mT
    return u[:, :, None] == v[:, None, :]
