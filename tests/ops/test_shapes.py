"""The ops' annotations: real calls of every op have the shapes and dtypes that its signature states."""

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from jaxtyping import Float, Int, jaxtyped
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels import ops

from op_cases import Case, decode_inputs, kept_of, make


class Members(type):
    """The type of a list whose members all fit an annotation: isinstance does not look into lists."""

    def __getitem__(cls, member: Any) -> Any:
        return Members("Sequence", (), {"member": member})

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and all(isinstance(each, cls.member) for each in value)


NAMES = {"Float": Float, "Int": Int, "Tensor": Tensor, "SparseCoefficients": lk.SparseCoefficients} | {
    "Callable": Callable,
    "Sequence": Members("Sequence", (), {}),
}


def fits(value: Any, hint: Any) -> bool:
    """Check a value; Python 3.10's isinstance asks of a union with None for the value's type only."""
    either = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return any(isinstance(value, each) for each in either)


def hold(op: Callable[..., Any], *args: Any) -> None:
    """Call an op; hold arguments and result to its annotations, each letter having one size throughout."""
    hints = get_type_hints(op, globalns=NAMES)
    bound = inspect.signature(op).bind(*args)
    with jaxtyped("context"):
        for name, value in bound.arguments.items():
            if hints[name] not in (int, Callable[[Tensor], Tensor]):
                assert fits(value, hints[name]), f"{name}: {list(value.shape)} is no {hints[name]}"
        result = op(*args)
        assert fits(result, hints["return"]), f"result {list(result.shape)} is no {hints['return']}"


CASES = {
    "odd": Case(),
    "one sample a sequence": Case(B=5, S=5, kept=7),
    "indices": Case(indices=True),
    "no samples": Case(S=0, kept=0),
}


@pytest.mark.parametrize("case", CASES)
def test_every_op_has_the_shapes_of_its_signature(case: str) -> None:
    """Each public op, on several problems, optional arguments included."""
    i = make(CASES[case], dtype=torch.float32)
    kept, factors = kept_of(i), (i["left"], i["right"])
    base = torch.zeros(i["shape"])
    hold(ops.project, i["x"], i["dy"], *factors)
    if i["x"].is_floating_point():
        hold(ops.project_tiled, i["x"], i["dy"], *factors)
    hold(ops.project_at, i["x"], i["dy"], *factors, kept)
    hold(ops.project_dense, i["grad"], *factors)
    hold(ops.project_topk, i["x"], i["dy"], *factors, len(kept.rows))
    hold(ops.project_topk, i["x"], i["dy"], *factors, len(kept.rows), base)
    hold(ops.batch_topk, base, 0)
    hold(ops.batch_topk_over_ranks, base, 0, lambda t: t, torch.zeros_like)
    hold(ops.batch_topk_over_columns, base, 0, 0, lambda t: t[None])
    hold(ops.gram, *factors)
    hold(ops.gram, *([each, each[:, :, :1]] for each in factors))
    hold(ops.gram_energy, kept, *factors)
    hold(ops.gram_energy_coactive, kept, *factors)
    hold(ops.gram_energy_coactive, kept, *([each, each[:, :, :1]] for each in factors))
    hold(ops.squared_gradient_norm, i["x"], i["dy"])
    hold(ops.squared_gradient_norm, [i["x"]] * 2, [i["dy"]] * 2)
    hold(ops.reconstruct, kept, *factors)
    hold(ops.squared_residual_norm, kept, *factors, i["grad"])


def test_decoding_has_the_shapes_of_its_signature() -> None:
    """Both forms of codes; a head with and without bias."""
    indices, values, weight = decode_inputs(5, 3, 11, 7)
    hold(ops.sparse_decode, indices, values, weight)
    hold(ops.sparse_decode, indices.flatten(), values.flatten(), weight, torch.arange(0, 16, 3))
    hold(ops.softmax_mean, values @ weight[:3], weight)
    hold(ops.softmax_mean, values @ weight[:3], weight, weight[:, 0])


def test_every_public_op_is_called_above() -> None:
    """No op in `ops` is left out of these tests, and each of its tensors has a shape."""
    public = {name for name, op in vars(ops).items() if inspect.isfunction(op) and op.__module__ == ops.__name__}
    source = inspect.getsource(test_every_op_has_the_shapes_of_its_signature)
    source += inspect.getsource(test_decoding_has_the_shapes_of_its_signature)
    assert public == {name for name in public if f"ops.{name}," in source}
    for name in public:
        assert Tensor not in get_type_hints(getattr(ops, name), globalns=NAMES).values(), name


def test_a_wrong_shape_is_seen() -> None:
    """The check is one: a result or an argument of another shape fails it."""

    def transposed(left: Float[Tensor, "K R O"], right: Float[Tensor, "K R I"]) -> Float[Tensor, "K O"]:  # noqa: F722
        return left.sum(1).mT

    with pytest.raises(AssertionError, match=r"result \[4, 2\] is no"):
        hold(transposed, torch.ones(2, 3, 4), torch.ones(2, 3, 5))
    with pytest.raises(AssertionError, match=r"right: \[2, 1, 5\] is no"):
        hold(transposed, torch.ones(2, 3, 4), torch.ones(2, 1, 5))
