"""Kernels on sizes of zero: empty results or zeros, and gradients of zero, as the truth's."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import l3d_kernels as lk

from helpers import assert_relative
from op_cases import DEFINED, OPS, Case, make, results

KERNELS = SimpleNamespace(**{name: partial(getattr(lk, name), backend="triton") for name in lk.__all__[1:]})
NONE = [{"K": 0, "kept": 0}, {"K": 0, "R": 1, "kept": 0}, {"S": 0, "kept": 0}, {"S": 0, "B": 0, "kept": 0}]


@pytest.mark.parametrize("sizes", [*NONE, {"T": 0}, {"R": 0}, {"O": 0}, {"I": 0}, {"O": 0, "I": 0}], ids=str)
@pytest.mark.parametrize("name", DEFINED)
def test_nothing_to_sum_is_zero(name: str, sizes: dict[str, int]) -> None:
    """Value and gradients have the shapes and values of the einsums'."""
    inputs, op = make(Case(**sizes)), OPS[name]
    (value, grads), (expected, true) = (results(run, inputs, op) for run in (lambda i: op.run(KERNELS, i), op.truth))
    assert value.shape == expected.shape
    assert_relative(value, expected, 1e-12)
    for own, grad in zip(grads, true, strict=True):
        assert_relative(own, grad, 1e-10)
    shape = inputs["shape"]
    kept = KERNELS.project_topk(inputs["x"], inputs["dy"], inputs["left"], inputs["right"], 0)
    assert [len(own) for own in kept.indices()] == [0, 0, shape[0] + 1, 0, shape[1] + 1]
    assert torch.equal(kept.row_offsets, torch.zeros(shape[0] + 1, dtype=torch.int64))
