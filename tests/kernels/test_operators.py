"""The operators as torch sees them: schemas, shapes known without running, autocast, mixed dtypes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.kernels.decode import sparse_decode
from l3d_kernels.kernels.energy import gram, gram_energy, squared_gradient_norm
from l3d_kernels.kernels.energy import reconstruct as reconstruction
from l3d_kernels.kernels.topk import batch_topk
from l3d_kernels.kernels.update import adam, rescale

from op_cases import Case, kept_of, make

INPUTS = make(Case(), dtype=torch.float32)
KEPT = kept_of(INPUTS)
ORDER = (KEPT.rows, KEPT.columns, KEPT.row_offsets, KEPT.column_order, KEPT.column_offsets)
CODES, WEIGHT = torch.tensor([[0, 2, 2], [1, 0, 3]]), torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
OFFSETS = torch.tensor([0, 4, 6])


def arguments() -> dict[str, tuple]:
    """Every operator with arguments that fit."""
    i, k = INPUTS, KEPT
    tiles = (k.values, k.columns, k.row_offsets, i["left"], i["right"])
    side = (k.values, k.rows, k.column_order, k.column_offsets, i["left"], i["right"])
    d_out, value = torch.ones(2, 5), torch.ones(2, 3)
    ones, pair = torch.ones(len(i["left"])), [i["left"].clone(), i["right"].clone()]
    lists = [[t.clone() for t in pair] for _ in range(3)]  # moments and gradients
    return {
        "batch_topk": (batch_topk.select, i["grad"][:, 0], 7, None),
        "gram": (gram.gram_forward, [i["left"]] * 2, [i["right"]] * 2),
        "coactive": (gram_energy.energy_forward, *tiles[:-2], [i["left"]] * 2, [i["right"]] * 2),
        "coactive backward": (gram_energy.energy_backward, torch.ones(6), k.values, *ORDER, pair[:1], pair[1:]),
        "reconstruct": (reconstruction.reconstruct_forward, *tiles),
        "reconstruct, left": (reconstruction.side_backward, i["grad"], *side, True),
        "reconstruct, right": (reconstruction.side_backward, i["grad"], *side, False),
        "residual norm": (reconstruction.residual_norm_forward, *tiles, i["grad"]),
        "residual": (reconstruction.residual, torch.ones(6), i["grad"], *tiles),
        "gradient norm": (squared_gradient_norm.norm_forward, [i["x"]] * 2, [i["dy"]] * 2),
        "adam": (adam.step_all, pair, *lists, [ones[:1]] * 2, ones, ones, ones, 0.1, 0.1, 0.001, 1e-8, 1),
        "rescale": (rescale.rescale_all, pair, [ones, ones + 1], ones),
        "decode": (sparse_decode.decode, CODES, value, WEIGHT, None),
        "decode, offsets": (sparse_decode.decode, CODES.flatten(), value.flatten(), WEIGHT, OFFSETS),
        "decode, values": (sparse_decode.d_values, d_out, CODES, WEIGHT, None),
        "decode, weight": (sparse_decode.d_weight, d_out, CODES, value, 4, None),
    }


@pytest.mark.parametrize("name", arguments())
def test_schema_and_shapes(name: str) -> None:
    """torch's own check: only what the schema names is written, outputs are no views, fake shapes are the real ones."""
    operator, *own = arguments()[name]
    torch.library.opcheck(operator, tuple(own), test_utils=("test_schema", "test_faketensor"))


CALLS: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "gram": (lambda i: lk.gram(i["left"], i["right"], backend="triton"), ("left", "right")),
    "gram_energy_coactive": (
        lambda i: lk.gram_energy_coactive(kept_of(i), i["left"], i["right"], backend="triton"),
        ("values", "left", "right"),
    ),
    "reconstruct": (
        lambda i: lk.reconstruct(kept_of(i), i["left"], i["right"], backend="triton"),
        ("values", "left", "right"),
    ),
    "squared_residual_norm": (
        lambda i: lk.squared_residual_norm(kept_of(i), i["left"], i["right"], i["grad"], backend="triton"),
        ("values", "left", "right", "grad"),
    ),
    "squared_gradient_norm": (lambda i: lk.squared_gradient_norm(i["x"], i["dy"], backend="triton"), ("x", "dy")),
    "sparse_decode": (
        lambda i: lk.sparse_decode(CODES % 2, i["values"][:6].view(2, 3), i["left"][0], backend="triton"),
        ("values", "left"),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_autocast(name: str) -> None:
    """Under autocast float32 inputs are taken in its dtype, as by a matrix product; gradients come back in float32."""
    call, leaves = CALLS[name]
    own = {key: INPUTS[key].clone().requires_grad_() for key in leaves}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = call(INPUTS | own)
    assert result.dtype == torch.bfloat16
    narrow = {key: INPUTS[key].bfloat16().requires_grad_() for key in leaves}
    expected = call(INPUTS | narrow)
    assert torch.equal(result, expected)
    grads = torch.autograd.grad(result.sum(), list(own.values()))
    expected_grads = torch.autograd.grad(expected.sum(), list(narrow.values()))
    for grad, narrow_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert torch.equal(grad, narrow_grad.float())


def test_top_k_keeps_its_dtype_under_autocast() -> None:
    """Selection computes nothing: autocast does not touch it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = lk.batch_topk(INPUTS["grad"][:, 0], 7, backend="triton")
    assert kept.values.dtype == kept.threshold.dtype == torch.float32
