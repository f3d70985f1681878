"""Every kernel in every launch configuration compiles for GPUs that are not here, without spills, on matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu import forms
from bench.gpu.forms import faults
from l3d_kernels import registry
from l3d_kernels.kernels.shared import launch_table
from l3d_kernels.kernels.shared.launch_table import KINDS

ROOT = Path(__file__).parents[2]
assert registry.load_kernels() == ""
from l3d_kernels.kernels import MODULES  # noqa: E402

NAMES = [module.__name__.removeprefix("l3d_kernels.kernels.") for module in MODULES]


def compiled(kind: str, *flags: str) -> list[dict[str, Any]]:
    """Compile a kind's forms in a program of its own, where Triton's interpreter is off."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu.forms", kind, *flags]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert finished.stdout, finished.stderr[-4000:]
    cases: list[dict[str, Any]] = json.loads(finished.stdout)
    assert len({case["name"] for case in cases}) == len(cases), "two cases have one name"
    return cases


def assert_sound(kind: str, cases: list[dict[str, Any]]) -> None:
    bad = {case["name"]: faults(case) for case in cases if faults(case)}
    assert cases
    assert not bad, f"{kind}: " + "; ".join(f"{name}: {', '.join(what)}" for name, what in bad.items())


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compile_ahead_of_time(kind: str) -> None:
    """A form of every kernel for each size class: no spills, shared memory within the limit, matrix instructions.

    A kind that takes another's rows compiles the projection only; the long test compiles all.
    """
    assert_sound(kind, compiled(kind, *(["--module", "project.fused"] if KINDS[kind] else [])))


@pytest.mark.slow_kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_compiles_ahead_of_time(kind: str, name: str) -> None:
    """As above, for every dtype, precision and constant that a launch may have."""
    assert_sound(kind, compiled(kind, "--module", name, "--long"))


def test_faults_are_found() -> None:
    """Each fault is reported; a sound form has none."""
    sound = {"kind": "sm_90", "spills": 0, "registers": 9, "shared": 1, "is_matrix": True, "matrix": ["mma.sync"]}
    sound["reordered"] = []
    assert faults(sound) == []
    assert faults(sound | {"spills": 8}) == ["spills 8 (registers 9)"]
    for kind, most in (("gfx942", 65536), ("gfx1100", 65536), ("sm_86", 101376), ("sm_120", 101376)):
        assert faults(sound | {"kind": kind, "shared": most}) == []
        assert faults(sound | {"kind": kind, "shared": most + 1}) == [f"{most + 1} bytes of shared memory"]
    assert faults(sound | {"reordered": ["tt.histogram of #a and #b"]}) == [
        "reshapes reordered apart before tt.histogram of #a and #b"
    ]
    assert faults(sound | {"matrix": []}) == ["no matrix instruction"]
    assert faults(sound | {"matrix": [], "is_matrix": False}) == []


def test_the_committed_table_is_of_all_forms() -> None:
    """It has figures of every form on every kind, and of no form that is no more; none spills, all fit."""
    table = json.loads(forms.FILE.read_text(encoding="utf-8"))["forms"]
    found = {(kind, name) for name, cells in table.items() for kind in cells}
    every = {(kind, case.name()) for kind in KINDS for case in forms.cases_of(kind, [], long=True)}
    assert found == every, "make it again: python -m bench.gpu.forms [KIND ..] [--module NAME ..] --long --write"
    for name, cells in table.items():
        for kind, (registers, shared, spills) in cells.items():
            assert (registers > 0, shared <= forms.SHARED[kind], spills) == (True, True, 0), f"{name} on {kind}"
    shown = forms.page()
    assert len([line for line in shown.splitlines() if line.startswith("| ")]) == len(table) + shown.count("\n## ")


@pytest.mark.parametrize(
    "name, kind",
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx90a", "gfx942"), ("gfx950", "gfx950"), ("gfx1151", "gfx1100")],
)
def test_amds_devices_take_the_rows_of_a_known_kind(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the architecture's name, without its features; CDNA's others are as gfx942, RDNA's as gfx1100."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=name))
    assert launch_table.kind_of(torch.device("cuda")) == kind


@pytest.mark.parametrize(
    "capability, kind",
    [((7, 5), 80), ((8, 6), 86), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)],
)
def test_nvidias_devices_take_the_rows_of_a_known_kind(
    capability: tuple[int, int], kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest older one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert launch_table.kind_of(torch.device("cuda")) == f"sm_{kind}"


def test_the_closest_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind's own row, then that of the kind it resembles, then the general one; dtype's before that of all dtypes."""
    rows = {key: launch_table.Launch({}, warps) for warps, key in enumerate([(None, None), (None, "16")])}
    monkeypatch.setitem(launch_table.TABLE, "some", rows)
    assert launch_table.lookup("some", "sm_120", "16").warps == 1
    assert launch_table.lookup("some", "sm_120", "32").warps == 0
    rows["sm_80", None] = launch_table.Launch({}, 2)
    rows["sm_89", "16"] = launch_table.Launch({}, 3)
    kinds = ("sm_120", "sm_89", "sm_86", "sm_90")
    assert [launch_table.lookup("some", kind, "16").warps for kind in kinds] == [3, 3, 2, 1]
    assert launch_table.lookup("some", "sm_120", "32").warps == 2


def test_every_launch_says_whether_products_and_sums_are_fused() -> None:
    """Triton's default differs by version; a launch does not leave it to that."""
    assert {launch_table.Launch({}).options(kind)["enable_fp_fusion"] for kind in (*KINDS, "interpreter")} == {True}


def assert_in_order(kind: str, *flags: str) -> None:
    cases = compiled(kind, "--counting", "25", *flags)
    bad = {case["name"]: case["reordered"] for case in cases if case["reordered"]}
    assert cases
    assert not bad, f"{kind}: {bad}"


@pytest.mark.parametrize("kind", ["sm_90"])
def test_a_tile_and_its_mask_stay_together(kind: str) -> None:
    """No form that counts a histogram, for T and R from 1 to 25, takes two reshapes that are reordered apart."""
    assert_in_order(kind)


@pytest.mark.slow_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_and_its_mask_stay_together_in_every_form(kind: str) -> None:
    """As above, for every dtype, precision and way to look x.right up."""
    assert_in_order(kind, "--long")


def test_reshapes_reordered_apart_are_found() -> None:
    """The reader finds a tile and a mask that come from different layouts, and lets one reshape, or like ones, be."""
    reshape = "%{} = tt.reshape %{} allow_reorder : tensor<64x64xi32, #{}> -> tensor<4096xi32, #linear> loc(#loc)"
    histogram = "%h = tt.histogram %a, %b : tensor<4096xi32, #linear> -> tensor<256xi32, #blocked> loc(#loc)"
    fixed = "%b = tt.reshape %2 : tensor<64x64xi1, #blocked> -> tensor<4096xi1, #linear> loc(#loc)"
    tile = reshape.format("a", "1", "mma")
    assert forms.reordered_apart("\n".join([tile, reshape.format("b", "2", "blocked"), histogram])) == [
        "tt.histogram of #blocked and #mma"
    ]
    assert forms.reordered_apart("\n".join([tile, reshape.format("b", "2", "mma"), histogram])) == []
    assert forms.reordered_apart("\n".join([tile, fixed, histogram])) == []
