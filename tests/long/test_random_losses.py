"""Compute the loss of random decompositions on random gradients, each compared with brute force in float64.

`make test-long` takes 2,000 losses, in parts that can be run apart, as tests/long/test_random_models.py does.
"""

import math
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from l3d.api import Decomposition
from l3d.decomposition import flat
from l3d.decomposition.directions import Directions, Tucker, Whole
from l3d.gradients.factors import Dense, Gradients, Part, Rows, matrix_shape

from random_cases import in_parts, run_part, seeded

# Of Σ(‖g‖² + 2|<g, ĝ>| + ‖ĝ‖²) / Σ‖g‖², which are what the loss is summed from, and of the largest derivative.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5}
NEAR = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative difference of coefficients that rounding may exchange


def draw_gradients(r: Random, integers: bool) -> Gradients:
    """Draw the gradients of one to five tensors of any order: factors with or without positions, indices, in full."""
    B, per_row = r.randint(1, 5), r.choice((1, 1, 1, 2, 4))
    S, n_tensors = B * per_row, r.randint(1, 5)

    def values(*shape: int) -> Tensor:
        drawn = torch.randint(-2, 3, shape).double() if integers else torch.randn(shape)
        return drawn * (torch.rand(shape) < r.choice((0.5, 1.0, 1.0)))

    parts: dict[str, list[Part]] = {}
    shapes: dict[str, torch.Size] = {}
    for i in range(n_tensors):
        order = r.choice((0, 1, 1, 2, 2, 2, 2, 3, 4))
        wide = r.random() < 0.1
        shapes[f"t{i}"] = shape = torch.Size(r.randint(1, 60 if wide and order == 2 else 7) for _ in range(order))
        matrix = matrix_shape(shape)
        own: list[Part] = []
        for _ in range(r.choice((0, 1, 1, 1, 1, 2))):
            T, axis = r.choice((1, 1, 2, 5, 20)), r.randint(0, 1)
            if order < 2 or r.random() < 0.2:
                own.append(Dense(values(S, *shape)))
            elif axis == 0 and order == 2 and r.random() < 0.6:
                own.append(Rows(torch.randint(matrix[0], (B, T)), values(S, T, matrix[1]), 0))
            else:
                own.append(Rows(values(B, T, matrix[axis]), values(S, T, matrix[1 - axis]), axis))
        parts[f"t{i}"] = own
    return Gradients(parts, shapes, S, torch.float64, torch.device("cpu"))


def draw_ranks(r: Random, gradients: Gradients) -> Any:
    """Draw a rank for each tensor of order two or more: a number, or one per mode."""
    shapes = {name: shape for name, shape in gradients.shapes.items() if len(shape) > 1}
    by_mode = {name: tuple(r.randint(1, min(4, d)) for d in shape) for name, shape in shapes.items()}
    number = {name: r.randint(1, min(7, *matrix_shape(shape))) for name, shape in shapes.items()}
    return {name: r.choice((number, by_mode))[name] for name in shapes} or 1


def multiplied_out(gradients: Gradients) -> Tensor:
    """Return all gradients in full, one outer product at a time: [S, entries]."""
    found = []
    for name, shape in gradients.shapes.items():
        total = torch.zeros(gradients.n_samples, *matrix_shape(shape))
        for part in gradients.parts[name]:
            if isinstance(part, Dense):
                total += part.grad.double().reshape(total.shape)
                continue
            per_row = len(part.dy) // len(part.x)
            for s, dy in enumerate(part.dy.double()):
                for t, row in enumerate(dy):
                    x = part.x[s // per_row, t]
                    if not part.x.is_floating_point():
                        total[s, x] += row
                    else:
                        total[s] += torch.outer(*((row, x.double()) if part.x_axis == 1 else (x.double(), row)))
        found.append(total.flatten(1))
    return torch.cat(found, 1)


def directions_in_full(directions: Directions, leaves: dict[str, Tensor]) -> Tensor:
    """Return all directions in full from their factors `leaves`, in float64: [K, entries]."""
    found = []
    for i, (name, piece) in enumerate(directions.items()):
        own = {key: leaves[f"pieces.{i}.{key}"] for key, _ in piece.named_parameters()}
        if isinstance(piece, Whole):
            full = own["vector"]
        elif isinstance(piece, Tucker):
            full = own["core"]
            for mode in range(len(directions.shapes[name])):
                full = torch.einsum("k...r,krd->kd...", full.movedim(mode + 1, -1), own[f"modes.{mode}"])
                full = full.movedim(1, mode + 1)
        else:
            full = torch.einsum("kro,kri->koi", own["left"], own["right"])
        found.append(full.flatten(1))
    return torch.cat(found, 1)


def check_loss(seed: int) -> dict[str, int]:
    """Draw loss number `seed`, and compare it and its derivatives by every factor with the definition's."""
    with seeded(seed) as r, pytest.MonkeyPatch.context() as patch:
        dtype = r.choice((torch.float32, torch.float64))
        integers = r.random() < 0.3  # sums are exact, and many coefficients equal in magnitude
        gradients = draw_gradients(r, integers)
        while not multiplied_out(gradients).any():  # of nothing there is no ratio
            gradients = draw_gradients(r, integers)
        scale = 2.0 ** r.randint(-80, 80) if dtype == torch.float32 and r.random() < 0.2 else 1.0
        gradients = gradients.changed(lambda part: _scaled(part, scale).to(torch.empty(0, dtype=dtype)), dtype=dtype)
        K = r.choice((1, 2, 5, 12, 40, 150))
        d = Decomposition(gradients.shapes, K, draw_ranks(r, gradients)).to(dtype)
        with torch.no_grad():
            for p in d.parameters():
                p.copy_(torch.randint(-1, 2, p.shape) if integers else torch.randn(p.shape))
        if not integers and r.random() < 0.7:
            d.encoder.normalize_()
            d.normalize_()
        k = r.choice((1e-6, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0))
        if r.random() < 0.5:
            patch.setattr(flat, "SMALL", 0)  # the path for all sizes

        leaves = {name: p.detach().double().requires_grad_() for name, p in d.named_parameters()}
        encoder, decoder = (
            directions_in_full(side, {n.removeprefix(f"{of}."): p for n, p in leaves.items() if n.startswith(f"{of}.")})
            for of, side in (("encoder", d.encoder), ("decoder", d.decoder))
        )
        g = multiplied_out(gradients) / scale
        coefficients = g @ encoder.mT
        n = max(1, math.floor(k * coefficients.numel() + 0.5))
        sizes = coefficients.detach().abs().flatten()
        order = sorted(range(len(sizes)), key=lambda i: (-sizes[i].item(), i))  # ties: the lower flat index first
        last, after = sizes[order[n - 1]].item(), sizes[order[n]].item() if n < len(order) else 0.0
        near = 0 < last - after <= NEAR[dtype] * last
        candidates = [order[:n], [*order[: n - 1], order[n]]] if near else [order[:n]]

        actual = d.loss(gradients, k)
        ours = torch.autograd.grad(actual, list(d.parameters()), allow_unused=True, materialize_grads=True)
        wrong = []
        for kept in candidates:
            mask = torch.zeros(len(sizes)).index_fill(0, torch.tensor(kept), 1.0).view_as(coefficients)
            rebuilt = (coefficients * mask) @ decoder
            right = (g - rebuilt).square().sum() / g.square().sum()
            summed = (g.square() + 2 * (g * rebuilt).abs() + rebuilt.square()).sum() / g.square().sum()
            expected = torch.autograd.grad(right, list(leaves.values()), retain_graph=True, materialize_grads=True)
            wrong = _differences(actual, right, summed, ours, expected, TOLERANCES[dtype], list(leaves))
            if not wrong:
                break
    assert not wrong, f"{dtype}, S={len(g)}, K={K}, k={k}, integers {integers}: " + "; ".join(wrong)
    tied = n < len(order) and last == after
    return {str(dtype): 1, "with a tie at the last kept": tied, "rounding may decide": near, "scaled": scale != 1}


def _scaled(part: Part, scale: float) -> Part:
    return Dense(part.grad * scale) if isinstance(part, Dense) else part._replace(dy=part.dy * scale)


def _differences(
    actual: Tensor, right: Tensor, summed: Tensor, ours: Any, expected: Any, tolerance: float, names: list[str]
) -> list[str]:
    """List what is wrong: the loss, or its derivative by a factor."""
    wrong = []
    if not abs(actual.item() - right.item()) <= tolerance * summed.item():
        wrong.append(f"loss {actual.item()!r}, not {right.item()!r}")
    largest = max(float(each.abs().max()) for each in expected) + summed.item()
    for name, a, b in zip(names, ours, expected, strict=True):
        error = float((a.double() - b).abs().max())
        if not error <= tolerance * largest:
            wrong.append(f"derivative by {name}: off by {error:.3g} of {largest:.3g}")
    return wrong


@in_parts
def test_random_losses(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss and derivatives are those of top-k with ties by lower flat index, a reconstruction and a difference."""
    run_part(check_loss, part, capsys)
