"""Problems for the ops: sizes, inputs, each op by any implementation, and truths that materialise V and G.

The truths share no code with the package: one einsum each, over V [K, O, I] and G [S, O, I].
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels import cpu, splitting
from l3d_kernels.cpu import energy as cpu_energy

from helpers import assert_relative

VALUES, GRADIENTS = 1e-12, 1e-10


class Case(NamedTuple):
    """Sizes of one problem; `kept` is how many coefficients are kept, `lopsided` keeps them in few subnetworks."""

    B: int = 2
    S: int = 6
    T: int = 3
    I: int = 5
    O: int = 7
    K: int = 4
    R: int = 2
    kept: int = 9
    indices: bool = False
    lopsided: bool = False


CASES = {
    "odd": Case(),
    "one sample a sequence": Case(B=5, S=5, kept=7),
    "one sequence": Case(B=1, S=3, kept=5),
    "one position": Case(T=1),
    "one position, one sample a sequence": Case(B=6, T=1),
    "many positions": Case(T=17, I=3, O=2),
    "rank one": Case(R=1),
    "one subnetwork": Case(K=1, kept=3),
    "many subnetworks, few kept": Case(K=23, kept=6),
    "high rank": Case(R=5, O=5),
    "rank beyond full": Case(R=9, I=3, O=2),
    "no samples": Case(S=0, kept=0),
    "no sequences": Case(B=0, S=0, kept=0),
    "no samples, many positions": Case(S=0, T=17, I=3, O=2, kept=0),
    "no samples, one position": Case(S=0, T=1, kept=0),
    "nothing kept": Case(kept=0),
    "one kept": Case(kept=1),
    "everything kept": Case(kept=24),
    "lopsided": Case(B=10, S=20, K=6, kept=37, lopsided=True),
    "indices": Case(indices=True),
    "indices, one position": Case(T=1, indices=True),
    "indices that repeat": Case(I=2, T=6, indices=True),
    "indices, many kept": Case(B=1, S=6, kept=20, indices=True),
    "indices, few kept": Case(B=6, S=6, K=9, kept=4, indices=True),
    "indices, no samples": Case(S=0, kept=0, indices=True),
    "single of everything": Case(B=1, S=1, T=1, I=1, O=1, K=1, R=1, kept=1),
}
FLOATS = ("x", "dy", "left", "right", "grad", "values")
Inputs = dict[str, Any]


def make(case: Case, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    """Draw the inputs of a case; the kept coefficients are their own draw, with the pairs in `pairs`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x: Tensor = normal(case.B, case.T, case.I)
    if case.indices:
        x = torch.randint(case.I, (case.B, case.T), generator=generator)
    scores = torch.rand(case.S, case.K, generator=generator) + 0.1
    if case.lopsided:  # one subnetwork in every sample, others once or never
        scores[:, 0] += 9
        scores[:, 1] += torch.arange(case.S) < case.S // 2
        scores[:, 3:] *= 0
        scores[0, 3:] += 5
    flat = scores.flatten().argsort(descending=True)[: case.kept].sort().values
    return {
        "x": x,
        "dy": normal(case.S, case.T, case.O),
        "left": normal(case.K, case.R, case.O),
        "right": normal(case.K, case.R, case.I),
        "grad": normal(case.S, case.O, case.I),
        "values": normal(case.kept),
        "pairs": torch.stack([flat // case.K, flat % case.K]),
        "shape": (case.S, case.K),
    }


def kept_of(inputs: Inputs) -> lk.SparseCoefficients:
    """Index the kept pairs by looping over them, as the documentation of `SparseCoefficients` says."""
    (S, K), (rows, columns) = inputs["shape"], inputs["pairs"]
    by_column = [[i for i, c in enumerate(columns.tolist()) if c == k] for k in range(K)]
    return lk.SparseCoefficients(
        values=inputs["values"],
        rows=rows,
        columns=columns,
        row_offsets=torch.tensor([sum(r < s for r in rows.tolist()) for s in range(S + 1)]),
        column_order=torch.tensor([i for entries in by_column for i in entries], dtype=torch.int64),
        column_offsets=torch.tensor([sum(len(e) for e in by_column[:k]) for k in range(K + 1)]),
        threshold=torch.tensor(float("nan")),
        shape=(S, K),
    )


# --- the truth: V and G in full, one einsum each ----------------------------------------------------------------


def true_gradient(i: Inputs) -> Tensor:
    """G [S, O, I]."""
    x, dy = i["x"], i["dy"]
    if not x.is_floating_point():
        x = torch.nn.functional.one_hot(x.long(), i["right"].shape[2]).to(dy)
    share = len(dy) // len(x) if len(x) else 1
    return torch.einsum("sti,sto->soi", torch.stack([x[s // share] for s in range(len(dy))]) if len(dy) else x[:0], dy)


def true_directions(i: Inputs) -> Tensor:
    """V [K, O, I]."""
    return torch.einsum("kro,kri->koi", i["left"], i["right"])


def true_coefficients(i: Inputs) -> Tensor:
    """The kept coefficients [S, K], zeros elsewhere."""
    dense = i["left"].new_zeros(i["shape"])
    rows, columns = i["pairs"]
    return dense.index_put((rows, columns), i["values"])


def true_projection(i: Inputs) -> Tensor:
    return torch.einsum("soi,koi->sk", true_gradient(i), true_directions(i))


def true_reconstruction(i: Inputs) -> Tensor:
    return torch.einsum("sk,koi->soi", true_coefficients(i), true_directions(i))


class Op(NamedTuple):
    """An op, its truth, and the inputs that carry gradients."""

    run: Callable[[Any, Inputs], Tensor]  # (the package, or a module with its ops; inputs)
    truth: Callable[[Inputs], Tensor]
    leaves: tuple[str, ...]


OPS = {
    "project": Op(
        lambda ops, i: ops.project(i["x"], i["dy"], i["left"], i["right"]),
        true_projection,
        ("x", "dy", "left", "right"),
    ),
    "project_tiled": Op(
        lambda ops, i: ops.project_tiled(i["x"], i["dy"], i["left"], i["right"]),
        true_projection,
        ("left", "right"),
    ),
    "project_at": Op(
        lambda ops, i: ops.project_at(i["x"], i["dy"], i["left"], i["right"], kept_of(i)),
        lambda i: true_projection(i)[i["pairs"][0], i["pairs"][1]],
        ("left", "right"),
    ),
    "project_dense": Op(
        lambda ops, i: ops.project_dense(i["grad"], i["left"], i["right"]),
        lambda i: torch.einsum("soi,koi->sk", i["grad"], true_directions(i)),
        ("grad", "left", "right"),
    ),
    "gram": Op(
        lambda ops, i: ops.gram(i["left"], i["right"]),
        lambda i: torch.einsum("koi,joi->kj", true_directions(i), true_directions(i)),
        ("left", "right"),
    ),
    "gram_by_factors": Op(
        lambda _, i: cpu_energy.gram_by_factors(i["left"], i["right"]),
        lambda i: torch.einsum("koi,joi->kj", true_directions(i), true_directions(i)),
        ("left", "right"),
    ),
    "gram_by_tiles": Op(
        lambda _, i: cpu_energy.gram_by_tiles(i["left"], i["right"]),
        lambda i: torch.einsum("koi,joi->kj", true_directions(i), true_directions(i)),
        ("left", "right"),
    ),
    "gram_energy": Op(
        lambda ops, i: ops.gram_energy(kept_of(i), i["left"], i["right"]),
        lambda i: true_reconstruction(i).square().sum((1, 2)),
        ("values", "left", "right"),
    ),
    "gram_energy_coactive": Op(
        lambda ops, i: ops.gram_energy_coactive(kept_of(i), i["left"], i["right"]),
        lambda i: true_reconstruction(i).square().sum((1, 2)),
        ("values", "left", "right"),
    ),
    "energy_by_tiles": Op(
        lambda _, i: cpu.energy_by_tiles(kept_of(i).dense(), i["left"], i["right"]),
        lambda i: true_reconstruction(i).square().sum((1, 2)),
        ("values", "left", "right"),
    ),
    "energy_from_gram": Op(
        lambda _, i: cpu.energy_from_gram(kept_of(i), lk.gram(i["left"], i["right"])),
        lambda i: true_reconstruction(i).square().sum((1, 2)),
        ("values", "left", "right"),
    ),
    "reconstruct": Op(
        lambda ops, i: ops.reconstruct(kept_of(i), i["left"], i["right"]),
        true_reconstruction,
        ("values", "left", "right"),
    ),
    "squared_residual_norm": Op(
        lambda ops, i: ops.squared_residual_norm(kept_of(i), i["left"], i["right"], i["grad"]),
        lambda i: (i["grad"] - true_reconstruction(i)).square().sum((1, 2)),
        ("values", "left", "right", "grad"),
    ),
    "squared_gradient_norm": Op(
        lambda ops, i: ops.squared_gradient_norm(i["x"], i["dy"]),
        lambda i: true_gradient(i).square().sum((1, 2)),
        ("x", "dy"),
    ),
    "outer": Op(
        lambda _, i: splitting.outer(i["x"], i["dy"], i["right"].shape[2]),
        true_gradient,
        ("x", "dy"),
    ),
    "dense": Op(lambda _, i: kept_of(i).dense(), true_coefficients, ("values",)),
}
IN_PLACE = ("adam_step", "rescale")  # the ops that change tensors and have no derivative: tests/ops/test_update.py
# the ops that `reference` defines, among those above
DEFINED = [name for name in OPS if name in lk.__all__]


def combinations(cases: Iterable[str]) -> list[Any]:
    """Every operation with every case it takes: one that multiplies x out takes no indices."""
    return [
        pytest.param(name, case, id=f"{name}-{case}")
        for name, case in itertools.product(OPS, cases)
        if not (name == "project_tiled" and CASES[case].indices)
    ]


def with_leaves(inputs: Inputs, op: Op) -> tuple[Inputs, list[Tensor]]:
    """Copy the inputs, with gradients asked for where the operation has them."""
    copied = dict(inputs)
    for name in op.leaves:
        if inputs[name].is_floating_point():
            copied[name] = inputs[name].detach().clone().requires_grad_()
    return copied, [copied[name] for name in op.leaves if copied[name].requires_grad]


def results(run: Callable[[Inputs], Tensor], inputs: Inputs, op: Op) -> tuple[Tensor, list[Tensor]]:
    """Return the value, and the gradients of the leaves for a random upstream gradient."""
    own, leaves = with_leaves(inputs, op)
    value = run(own)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(value.dtype)
    if not leaves:
        return value, []
    grads = torch.autograd.grad(value, leaves, upstream, allow_unused=True, materialize_grads=True)
    return value, list(grads)


def assert_true(name: str, inputs: Inputs, ops: Any = lk) -> None:
    """Hold an op's value and gradients, as `ops` computes them, to the truth's."""
    op = OPS[name]
    value, grads = results(lambda i: op.run(ops, i), inputs, op)
    expected, expected_grads = results(op.truth, inputs, op)
    assert_relative(value, expected, VALUES)
    assert len(grads) == len(expected_grads)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_relative(grad, expected_grad, GRADIENTS)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def integers(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int64)


FITTING = make(Case(B=3, S=6, T=4, I=5, O=7, K=2, R=2, kept=3), dtype=torch.float32)


def decode_inputs(A: int, k: int, L: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw codes (indices, values) and a dictionary."""
    generator = torch.Generator().manual_seed(A + 10 * k + 100 * L)
    indices = torch.randint(L, (A, k), generator=generator)
    values = torch.randn(A, k, generator=generator, dtype=torch.float64)
    return indices, values, torch.randn(L, D, generator=generator, dtype=torch.float64)


def calls() -> dict[str, Callable[..., Any]]:
    """Return every public op on inputs that fit, taking the backend."""
    f, kept = FITTING, kept_of(FITTING)
    return {
        "project": lambda **b: lk.project(f["x"], f["dy"], f["left"], f["right"], **b),
        "project_tiled": lambda **b: lk.project_tiled(f["x"], f["dy"], f["left"], f["right"], **b),
        "project_at": lambda **b: lk.project_at(f["x"], f["dy"], f["left"], f["right"], kept, **b),
        "project_dense": lambda **b: lk.project_dense(f["grad"], f["left"], f["right"], **b),
        "gram": lambda **b: lk.gram(f["left"], f["right"], **b),
        "gram_energy": lambda **b: lk.gram_energy(kept, f["left"], f["right"], **b),
        "gram_energy_coactive": lambda **b: lk.gram_energy_coactive(kept, f["left"], f["right"], **b),
        "reconstruct": lambda **b: lk.reconstruct(kept, f["left"], f["right"], **b),
        "squared_residual_norm": lambda **b: lk.squared_residual_norm(kept, f["left"], f["right"], f["grad"], **b),
        "squared_gradient_norm": lambda **b: lk.squared_gradient_norm(f["x"], f["dy"], **b),
        "sparse_decode": lambda **b: lk.sparse_decode(integers(2, 1), zeros(2, 1), zeros(3, 4), **b),
        "batch_topk": lambda **b: lk.batch_topk(zeros(2, 3), 2, **b).values,
        "project_topk": lambda **b: lk.project_topk(f["x"], f["dy"], f["left"], f["right"], 3, **b).values,
        "softmax_mean": lambda **b: lk.softmax_mean(zeros(2, 3), zeros(4, 3), **b),
    }
