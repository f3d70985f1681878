"""Random problems for `project_topk`, and what a kernel's selection must be."""

from random import Random
from typing import Any

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.project import project

from tools import assert_as_good, to_dtype

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def draw(seed: int, most: int = 40) -> dict[str, Any]:
    """Draw sizes up to `most` and inputs: of small integers, whose sums are exact, or normal ones; some all zero."""
    rng, generator = Random(seed), torch.Generator().manual_seed(seed)
    T, R, K = (rng.choice((1, 2, 3, rng.randint(1, most))) for _ in range(3))
    B, share, I, O = rng.randint(1, 6), rng.choice((1, 1, 2, 6)), rng.randint(1, 8), rng.randint(1, 8)
    S, integers = B * share, rng.random() < 0.5

    def tensor(*shape: int) -> Tensor:
        if integers:  # mostly zero, so that many sums are equal
            return (torch.randint(-3, 4, shape, generator=generator) / 2).trunc().double()
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    i = {"x": tensor(B, T, I), "dy": tensor(S, T, O), "left": tensor(K, R, O), "right": tensor(K, R, I)}
    i["base"] = rng.choice((None, tensor(S, K), torch.zeros(S, K, dtype=torch.float64)))
    if rng.random() < 0.1:
        i[rng.choice(("x", "left"))].zero_()
    n = rng.choice((0, 1, S * K, rng.randint(0, S * K), rng.randint(0, S * K)))
    return to_dtype(i, DTYPES[seed % 4]) | {"n": n, "integers": integers}


def select(i: dict[str, Any], backend: str) -> lk.SparseCoefficients:
    return lk.project_topk(i["x"], i["dy"], i["left"], i["right"], i["n"], i["base"], backend=backend)


def coefficients(i: dict[str, Any]) -> Tensor:
    """Return base plus coefficients: [S, K], in the inputs' dtype."""
    c = lk.project(i["x"], i["dy"], i["left"], i["right"], backend="torch")
    return c if i["base"] is None else i["base"] + c


def check(i: dict[str, Any], kept: lk.SparseCoefficients, dense: Tensor) -> None:
    """Compare a selection, and the coefficients that the kernels found, with the twin's and with the float64 truth."""
    exact = coefficients(to_dtype(i, torch.float64))
    if i["integers"]:
        assert torch.equal(dense, exact.to(dense.dtype)), "every sum is exact"
    else:
        assert_as_good(dense, coefficients(i), exact)
    expected = lk.batch_topk(dense, i["n"], backend="torch")  # ties: the lower flat index first
    for name in ("rows", "columns", "values", "row_offsets", "column_order", "column_offsets", "threshold"):
        assert torch.equal(getattr(kept, name), getattr(expected, name)), name


def own_coefficients(i: dict[str, Any]) -> Tensor:
    """Return the kernels' coefficients [S, K]."""
    return project.coefficients(i["x"], i["dy"], i["left"], i["right"], i["base"], None)
