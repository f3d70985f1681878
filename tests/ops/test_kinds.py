"""Arguments of a wrong kind, to every argument of every public op: one ValueError line that names an argument."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels import ops, splitting
from l3d_kernels.sparse import SparseCoefficients

from helpers import assert_relative
from op_cases import DEFINED, FITTING, IN_PLACE, OPS, Case, integers, kept_of, make, results, zeros

F, KEPT = FITTING, kept_of(FITTING)
ROWS, FACTORS = {"x": F["x"], "dy": F["dy"]}, {"left": F["left"], "right": F["right"]}
MATRIX = torch.arange(12.0).view(3, 4)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "project": ROWS | FACTORS,
    "project_tiled": ROWS | FACTORS,
    "project_at": ROWS | FACTORS | {"kept": KEPT},
    "project_dense": {"grad": F["grad"]} | FACTORS,
    "project_topk": ROWS | FACTORS | {"n": 3, "base": zeros(6, 2)},
    "batch_topk": {"coefficients": MATRIX, "n": 2, "n_groups": 2},
    "batch_topk_over_ranks": {"coefficients": MATRIX, "n": 2, "total": lambda t: t, "earlier": torch.zeros_like},
    "batch_topk_over_columns": {"coefficients": MATRIX, "n": 2, "rank": 0, "gather": lambda t: t[None]},
    "gram": FACTORS,
    "gram_energy": {"kept": KEPT} | FACTORS,
    "gram_energy_coactive": {"kept": KEPT} | FACTORS,
    "squared_gradient_norm": ROWS,
    "reconstruct": {"kept": KEPT} | FACTORS,
    "squared_residual_norm": {"kept": KEPT} | FACTORS | {"grad": F["grad"]},
    "sparse_decode": {
        "indices": torch.tensor([0, 2, 1]),
        "values": torch.ones(3),
        "weight": zeros(4, 5),
        "row_offsets": torch.tensor([0, 1, 3]),
    },
    "softmax_mean": {"hidden": zeros(2, 3), "weight": zeros(4, 3), "bias": zeros(4)},
}
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "a list": lambda t: t.tolist(),
    "an array": lambda t: t.numpy(),
    "a number": lambda _: 3,
    "complex": lambda t: t.to(torch.complex64),
    "booleans": lambda t: t.bool(),
    "narrow integers": lambda t: t.to(torch.int16),
    "eight bits": lambda t: t.to(torch.float8_e4m3fn),
    "another dtype": lambda t: t.double() if t.is_floating_point() else t.float(),
    "integers": lambda t: t.long() if t.is_floating_point() else t.to(torch.uint8),
    "another device": lambda t: t.to("meta"),
    "a scalar": lambda t: t.flatten()[0],
    "one dimension more": lambda t: t[None],
    "one dimension less": lambda t: t[0],
    "sparse": lambda t: t.to_sparse(),
    "None": lambda _: None,
}
COUNTS: list[Any] = [2.0, 2.5, "2", None, True, -1, 10**9, torch.tensor(2.0), torch.tensor([1, 2]), np.float32(2), [2]]


def assert_refused(name: str, arguments: dict[str, Any]) -> str:
    """Call an op; return the one line, which begins with an argument, and has no "Error" of a library in it."""
    with pytest.raises(ValueError, match=":") as error:
        getattr(ops, name)(**arguments)
    line = str(error.value)
    assert "\n" not in line
    assert line.split(":")[0].split(".")[0] in arguments, line
    assert error.value.__cause__ is None
    return line


def wrong_tensors() -> list[Any]:
    """Return every tensor of every op with every wrong kind; an op's only tensor may be anywhere, of any float."""
    cases = []
    for name, arguments in ARGUMENTS.items():
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        for key, kind in itertools.product(tensors, TENSORS):
            optional = inspect.signature(getattr(ops, name)).parameters[key].default is None
            alone = len(tensors) == 1 and kind in ("another dtype", "another device")
            if not alone and not (optional and kind == "None"):
                cases.append(pytest.param(name, key, TENSORS[kind], id=f"{name}-{key}-{kind}"))
    return cases


@pytest.mark.parametrize("name, key, change", wrong_tensors())
def test_tensors_of_a_wrong_kind(name: str, key: str, change: Callable[[Tensor], Any]) -> None:
    """No tensor, another dtype, device, layout or number of dimensions."""
    assert_refused(name, ARGUMENTS[name] | {key: change(ARGUMENTS[name][key])})


@pytest.mark.parametrize("value", COUNTS, ids=repr)
@pytest.mark.parametrize(
    "name, key", [(name, key) for name in ARGUMENTS for key in ("n", "n_groups", "rank") if key in ARGUMENTS[name]]
)
def test_counts_of_a_wrong_kind(name: str, key: str, value: Any) -> None:
    """n=2.0 and all that is no integer in range; the line names the count."""
    assert assert_refused(name, ARGUMENTS[name] | {key: value}).startswith(f"{key}: expected ")


@pytest.mark.parametrize("two", [2, np.int64(2), np.uint8(2), torch.tensor(2)], ids=repr)
def test_integers_of_any_kind_are_counts(two: Any) -> None:
    """numpy's integers and integer tensors of one element."""
    for name in ("batch_topk", "batch_topk_over_ranks", "batch_topk_over_columns"):
        assert getattr(ops, name)(**ARGUMENTS[name] | {"n": two}).values.numel() in (2, 4)
    assert lk.batch_topk(MATRIX, 1, two).values.tolist() == [9, 11]
    assert lk.project_topk(**ARGUMENTS["project_topk"] | {"n": two}).values.numel() == 2


@pytest.mark.parametrize("name", ["batch_topk_over_ranks", "batch_topk_over_columns"])
@pytest.mark.parametrize("value", [None, 3, "sum"])
def test_functions_of_a_wrong_kind(name: str, value: Any) -> None:
    """What cannot be called is refused by name."""
    for key in {"total", "earlier", "gather"} & set(ARGUMENTS[name]):
        assert assert_refused(name, ARGUMENTS[name] | {key: value}).startswith(f"{key}: expected a function")


WITH_KEPT = [name for name in ARGUMENTS if "kept" in ARGUMENTS[name]]
ENTRIES = SparseCoefficients(  # [3, 4]: (0, 1), (0, 3), (2, 1)
    values=torch.tensor([1.0, 2.0, 3.0]),
    rows=torch.tensor([0, 0, 2]),
    columns=torch.tensor([1, 3, 1]),
    row_offsets=torch.tensor([0, 2, 2, 3]),
    column_order=torch.tensor([0, 2, 1]),
    column_offsets=torch.tensor([0, 0, 2, 2, 3]),
    threshold=torch.tensor(1.0),
    shape=(3, 4),
)
BROKEN: dict[str, dict[str, Any]] = {
    "offsets that fall": {"row_offsets": torch.tensor([0, 2, 1, 3])},
    "offsets from 1": {"row_offsets": torch.tensor([1, 2, 2, 3])},
    "offsets to 2": {"row_offsets": torch.tensor([0, 2, 2, 2])},
    "offsets too few": {"row_offsets": torch.tensor([0, 2, 3])},
    "offsets in float": {"row_offsets": torch.tensor([0.0, 2, 2, 3])},
    "offsets in int32": {"row_offsets": torch.tensor([0, 2, 2, 3], dtype=torch.int32)},
    "offsets in a list": {"row_offsets": [0, 2, 2, 3]},
    "column offsets that fall": {"column_offsets": torch.tensor([0, 3, 2, 2, 3])},
    "columns out of range": {"columns": torch.tensor([1, 4, 1])},
    "columns below 0": {"columns": torch.tensor([-1, 3, 1])},
    "columns out of order": {"columns": torch.tensor([3, 1, 1])},
    "columns twice": {"columns": torch.tensor([1, 1, 1])},
    "columns elsewhere": {"columns": torch.tensor([1, 3, 1], device="meta")},
    "rows out of range": {"rows": torch.tensor([0, 0, 3])},
    "rows out of order": {"rows": torch.tensor([2, 0, 0])},
    "rows too few": {"rows": torch.tensor([0, 0])},
    "an order twice": {"column_order": torch.tensor([0, 2, 2])},
    "an order of rows": {"column_order": torch.tensor([0, 1, 2])},
    "values too few": {"values": torch.ones(2)},
    "values in two dimensions": {"values": torch.ones(3, 1)},
    "a scalar": {"rows": torch.tensor(0)},
}


def around(name: str, kept: Any) -> dict[str, Any]:
    """Return arguments that fit coefficients [3, 4]."""
    every = {"x": zeros(3, 1, 2), "dy": zeros(3, 1, 5), "left": zeros(4, 1, 5), "right": zeros(4, 1, 2)}
    every |= {"grad": zeros(3, 5, 2), "kept": kept}
    return {key: every[key] for key in ARGUMENTS[name]}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("name", WITH_KEPT)
def test_entries_that_contradict_each_other(name: str, broken: str) -> None:
    """Made by hand, or by _replace from entries that were taken before; the line names the field."""
    getattr(ops, name)(**around(name, ENTRIES))
    line = assert_refused(name, around(name, ENTRIES._replace(**BROKEN[broken])))
    assert line.startswith("kept."), line
    found = lk.batch_topk(torch.tensor([[0, 1.0, 0, 2], [0, 0, 0, 0], [0, 3, 0, 0]]), 3)
    getattr(ops, name)(**around(name, found))
    assert assert_refused(name, around(name, found._replace(**BROKEN[broken]))) == line


@pytest.mark.parametrize("name", WITH_KEPT)
@pytest.mark.parametrize("kept", [ENTRIES.dense(), tuple(ENTRIES), None, 3, ENTRIES._asdict()], ids=type)
def test_coefficients_of_a_wrong_kind(name: str, kept: Any) -> None:
    """A dense matrix and the like; the line says what returns the right kind."""
    line = assert_refused(name, around(name, kept))
    assert line.startswith("kept: expected SparseCoefficients, as batch_topk returns them, got ")


@pytest.mark.parametrize("name", [name for name in WITH_KEPT if name != "project_at"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64, torch.bool], ids=str)
def test_values_of_another_dtype(name: str, dtype: torch.dtype) -> None:
    """The values that an op reads have the factors' dtype."""
    line = assert_refused(name, around(name, ENTRIES._replace(values=ENTRIES.values.to(dtype))))
    assert line == f"kept.values: expected dtype torch.float32 to match left, got {dtype}"


@pytest.mark.parametrize("offsets", [[0, 2, 1, 3], [1, 2, 3], [0, 2], [0, 4], [-1, 3], [3], [], [0, 3, 0], [[0, 3]]])
def test_offsets_of_codes(offsets: list[Any]) -> None:
    """Offsets that fall, do not begin at 0 or end elsewhere, in both widths."""
    for dtype in (torch.int64, torch.int32):
        own = ARGUMENTS["sparse_decode"] | {"row_offsets": torch.tensor(offsets, dtype=dtype)}
        assert assert_refused("sparse_decode", own).startswith("row_offsets: expected ")


@pytest.mark.parametrize("narrow", ["indices", "row_offsets", "both"])
def test_codes_in_int32(narrow: str) -> None:
    """Indices and offsets of either width, also of one each."""
    own = dict(ARGUMENTS["sparse_decode"]) | {"weight": torch.eye(4)}
    expected = lk.sparse_decode(**own)
    for key in ("indices", "row_offsets") if narrow == "both" else (narrow,):
        own[key] = own[key].int()
    assert torch.equal(lk.sparse_decode(**own), expected)
    assert torch.equal(lk.sparse_decode(own["indices"][None], own["values"][None], torch.eye(4))[0], expected.sum(0))


@pytest.mark.parametrize("index", [-1, -100, 5, 10**6])
@pytest.mark.parametrize("name", ["project", "project_at", "project_topk", "squared_gradient_norm"])
def test_indices_out_of_range(name: str, index: int) -> None:
    """torch would count from the end, or end in an IndexError. A norm alone knows no upper end."""
    x = integers(3, 4)
    x[2, 1] = index
    arguments = ARGUMENTS[name] | {"x": x}
    if name == "squared_gradient_norm" and index > 0:
        assert lk.squared_gradient_norm(**arguments).shape == (6,)
        return
    assert assert_refused(name, arguments).endswith(f", got {index}")
    codes = ARGUMENTS["sparse_decode"] | {"indices": torch.tensor([0, index, 1])}
    assert assert_refused("sparse_decode", codes) == f"indices: expected indices from 0 to 3, got {index}"


NONE = [{"K": 0, "kept": 0}, {"K": 0, "R": 1, "kept": 0}, {"S": 0, "kept": 0}, {"S": 0, "B": 0, "kept": 0}]
EMPTY = [*NONE, {"T": 0}, {"R": 0}, {"O": 0}, {"I": 0}, {"O": 0, "I": 0}, {"O": 0, "R": 1}]


@pytest.mark.parametrize("chunk", [1, splitting.CHUNK])
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
@pytest.mark.parametrize("name", DEFINED)
def test_nothing_to_sum_is_zero(name: str, sizes: dict[str, int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of zero: empty results or zeros, and gradients of zero."""
    monkeypatch.setattr(splitting, "CHUNK", chunk)
    inputs, op = make(Case(**sizes)), OPS[name]
    (value, grads), (expected, true) = (results(run, inputs, op) for run in (lambda i: op.run(lk, i), op.truth))
    assert value.shape == expected.shape
    assert_relative(value, expected, 1e-12)
    for own, grad in zip(grads, true, strict=True):
        assert_relative(own, grad, 1e-10)
    shape = inputs["shape"]
    kept = lk.batch_topk(torch.zeros(shape), 0)
    assert [len(own) for own in kept.indices()] == [0, 0, shape[0] + 1, 0, shape[1] + 1]
    assert lk.project_topk(inputs["x"], inputs["dy"], inputs["left"], inputs["right"], 0).shape == shape


def test_every_op_and_argument_is_here() -> None:
    """Each public op with each of its arguments but the backend."""
    public = {name for name, op in vars(ops).items() if inspect.isfunction(op) and op.__module__ == ops.__name__}
    assert public == set(ARGUMENTS) >= set(lk.__all__) - {"SparseCoefficients", *IN_PLACE}
    for name, arguments in ARGUMENTS.items():
        assert {*arguments, "backend"} >= set(inspect.signature(getattr(ops, name)).parameters)
        getattr(ops, name)(**arguments)


@pytest.mark.parametrize("name", WITH_KEPT)
@pytest.mark.parametrize("field", ["rows", "columns", "row_offsets", "column_order", "column_offsets"])
def test_entries_changed_in_place(name: str, field: str) -> None:
    """Indices that an op has taken before are looked at again once they have been written to."""
    found = lk.batch_topk(torch.tensor([[0, 1.0, 0, 2], [0, 0, 0, 0], [0, 3, 0, 0]]), 3)
    getattr(ops, name)(**around(name, found))
    getattr(found, field)[1] = 7
    assert assert_refused(name, around(name, found)).startswith(f"kept.{field}: ")
    with torch.inference_mode():
        assert getattr(ops, name)(**around(name, lk.batch_topk(MATRIX, 3))).isfinite().all()
