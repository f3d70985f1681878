"""`project` by library products in chunks: value and gradients against the twin's, whatever the chunks; the table."""

from typing import Any

import pytest
import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels import cpu, registry
from l3d_kernels.kernels.project import chunked as project_chunked
from l3d_kernels.kernels.project import project
from l3d_kernels.kernels.shared import common
from l3d_kernels.kernels.shared import path_table as paths
from l3d_kernels.kernels.shared.launch_table import KINDS
from l3d_kernels.kernels.topk import radix

from project_cases import CASES, EMPTY, leaves, make
from tools import DTYPES, assert_kernel, assert_same_twice, gradients, launches, normal, strided, to_dtype

NAMES = ("shared", "one sample a sequence", "several tiles", "many ranks", "one position, shared", "indices")


def run(i: dict[str, Any], backend: str) -> Tensor:
    if backend == "torch":
        return lk.project(i["x"], i["dy"], i["left"], i["right"], backend="torch")
    return project.project(i["x"], i["dy"], i["left"], i["right"], path=paths.CHUNKED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    """The error is at most twice the twin's, in every dtype; no kernel of the other path runs."""
    case = CASES[name]
    with launches() as seen:
        assert_kernel(run, make(case), leaves(case), dtype, "project_multiply")
    assert not {"project_pair", "project_seen"} & set(seen)


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_do(name: str) -> None:
    """Sizes of zero give zeros of the right shape."""
    case = EMPTY[name]
    value, _ = gradients(run, make(case), (), "triton")
    assert torch.equal(value, torch.zeros(case.S, case.K, dtype=torch.float64))


@pytest.mark.parametrize("name", ["shared", "one sample a sequence", "indices"])
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one sequence and one subnetwork, or of two of each, give the values of one chunk."""
    inputs, case = make(CASES[name]), CASES[name]
    whole = run(inputs, "triton")
    share = case.S // case.B
    for each in (1, 4):
        monkeypatch.setattr(common, "WORKSPACE", each * (share + 1) * case.T * case.R)
        with launches() as seen:
            torch.testing.assert_close(run(inputs, "triton"), whole, rtol=1e-13, atol=1e-13)
        assert seen["project_multiply"] == (case.K * case.B if each == 1 else -(-case.K // 4) * case.B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_histogram_is_that_of_what_is_stored(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a base added and in several chunks, the epilogue counts what it stores, to the last coefficient."""
    case = CASES["several tiles"]
    i, base = to_dtype(make(case), dtype), normal(case.S, case.K, seed=9, dtype=dtype)
    monkeypatch.setattr(common, "WORKSPACE", 600)
    histogram = radix.first_histogram(dtype, base.device)
    with launches() as seen:
        dense = project_chunked.coefficients(i["x"], i["dy"], i["left"], i["right"], base, histogram)
    assert seen["project_multiply"] > 1
    assert torch.equal(histogram, radix.digit_histogram(dense, 0, radix.begin(1, dense.device))[0])
    expected = base + cpu.project(i["x"], i["dy"], i["left"], i["right"])
    error = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(dense, expected, rtol=error, atol=error * float(expected.abs().max()))


def test_gradcheck() -> None:
    """Gradients agree with differences in float64."""
    case = CASES["shared"]
    free = [value.requires_grad_() for value in make(case).values()]
    torch.autograd.gradcheck(lambda *a: project.project(*a, path=paths.CHUNKED), free, fast_mode=True)


def test_same_bits_twice_and_whatever_the_strides() -> None:
    """Two runs, and inputs with gaps, give the same bits."""
    inputs = make(CASES["several tiles"])
    assert_same_twice(run, inputs, ("left", "right"))
    assert torch.equal(run({key: strided(t) for key, t in inputs.items()}, "triton"), run(inputs, "triton"))


# --- the table --------------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[Any, str]:
    """An empty table of paths."""
    rows: dict[Any, str] = {}
    monkeypatch.setattr(paths, "PATHS", rows)
    return rows


def test_the_committed_rows_name_paths_that_exist() -> None:
    """Every row is of an operation with kernels, a known device, arithmetic and class, and names one of its paths."""
    for (op, kind, products, width), path in paths.PATHS.items():
        assert op in registry.TRITON
        assert kind in (None, *KINDS)
        assert products in (None, "16", "tf32", "fp32")
        assert width in (None, "narrow", "wide", "widest")
        assert path in (*project.PATHS, paths.TWIN) if op == "project" else path == paths.TWIN
    assert [registry.width_class(n) for n in (1, 1023, 1024, 3071, 3072)] == ["narrow"] * 2 + ["wide"] * 2 + ["widest"]


def test_the_most_special_row_counts(table: dict[Any, str]) -> None:
    """A row of the device, the arithmetic and the width goes before more general ones; none means the kernels."""
    cpu = torch.device("cpu")
    assert paths.path_of("project", cpu, torch.float32, "narrow") == paths.FUSED
    table["project", None, None, None] = paths.CHUNKED
    table["project", None, "tf32", "wide"] = paths.FUSED
    table["project", "interpreter", "16", "wide"] = paths.TWIN
    table["project", "sm_90", "16", None] = paths.FUSED
    assert paths.path_of("project", cpu, torch.bfloat16, "wide") == paths.TWIN
    assert paths.path_of("project", cpu, torch.bfloat16, "narrow") == paths.CHUNKED
    assert paths.path_of("project", cpu, torch.float32, "wide") == paths.CHUNKED  # exact
    torch.set_float32_matmul_precision("high")
    try:
        assert paths.path_of("project", cpu, torch.float32, "wide") == paths.FUSED
    finally:
        torch.set_float32_matmul_precision("highest")
    assert paths.path_of("gram", cpu, torch.float32, "wide") == paths.FUSED


def test_a_call_takes_the_tables_path(table: dict[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table names is launched; the twin by "auto" only, as by a device that has kernels; compiled too."""
    i = {key: t.float() for key, t in make(CASES["shared"]).items()}
    monkeypatch.setattr(registry, "DEVICES", ("cpu",))  # "auto" would not take kernels on a CPU
    for path, kernel in ((paths.FUSED, "project_seen"), (paths.CHUNKED, "project_multiply")):
        table["project", None, None, "narrow"] = path
        for backend in ("auto", "triton"):
            with launches(kernel) as seen:
                lk.project(i["x"], i["dy"], i["left"], i["right"], backend=backend)
            assert len(seen) == 1
    table["project", None, None, "narrow"] = paths.TWIN
    with launches() as seen:
        own = lk.project(i["x"], i["dy"], i["left"], i["right"])
        compiled = torch.compile(lk.project, fullgraph=True, backend="eager")(*i.values())
    assert not seen
    assert torch.equal(own, compiled)
    with launches("project_seen"):
        lk.project(i["x"], i["dy"], i["left"], i["right"], backend="triton")
