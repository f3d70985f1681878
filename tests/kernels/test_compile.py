"""Every kernel in every launch configuration compiles for GPUs that are not here, without spills, on matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from l3d_kernels import registry
from l3d_kernels.kernels.shared.launch_table import KINDS

AOT = Path(__file__).parents[1] / "support" / "aot.py"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
assert registry.load_kernels() == ""
from l3d_kernels.kernels import MODULES  # noqa: E402

NAMES = [module.__name__.removeprefix("l3d_kernels.kernels.") for module in MODULES]


def compiled(kind: str, names: list[str], *flags: str) -> list[dict[str, Any]]:
    """Compile a kind's cases in a program of its own, where Triton's interpreter is off."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(AOT), kind, *names, *flags]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert finished.returncode == 0, finished.stderr[-4000:]
    cases: list[dict[str, Any]] = json.loads(finished.stdout)
    assert len({case["name"] for case in cases}) == len(cases), "two cases have one name"
    return cases


def faults(kind: str, case: dict[str, Any]) -> list[str]:
    """Return what is wrong with a compiled case."""
    found = []
    if case["spills"]:
        found.append(f"spills {case['spills']} (registers {case['registers']})")
    if case["shared"] > SHARED[kind]:
        found.append(f"{case['shared']} bytes of shared memory")
    if case["reordered"]:
        found.append(f"reshapes reordered apart before {', '.join(case['reordered'])}")
    if case["is_matrix"] and not case["matrix"]:
        found.append("no matrix instruction")
    return found


def assert_sound(kind: str, cases: list[dict[str, Any]]) -> None:
    bad = {case["name"]: faults(kind, case) for case in cases if faults(kind, case)}
    assert cases
    assert not bad, f"{kind}: " + "; ".join(f"{name}: {', '.join(what)}" for name, what in bad.items())


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compile_ahead_of_time(kind: str) -> None:
    """A form of every kernel for each size class: no spills, shared memory within the limit, matrix instructions."""
    assert_sound(kind, compiled(kind, NAMES))


@pytest.mark.slow_kernels
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_compiles_ahead_of_time(kind: str, name: str) -> None:
    """As above, for every dtype, precision and constant that a launch may have."""
    assert_sound(kind, compiled(kind, [name], "--long"))


def test_faults_are_found() -> None:
    """Each fault is reported; a sound case has none."""
    sound = {"name": "a", "spills": 0, "registers": 9, "shared": 1, "is_matrix": True, "matrix": ["mma.sync"]}
    sound["reordered"] = []
    assert faults("sm_90", sound) == []
    assert faults("sm_90", sound | {"spills": 8}) == ["spills 8 (registers 9)"]
    assert faults("gfx942", sound | {"shared": 65537}) == ["65537 bytes of shared memory"]
    assert faults("sm_90", sound | {"reordered": ["tt.histogram of #a and #b"]}) == [
        "reshapes reordered apart before tt.histogram of #a and #b"
    ]
    assert faults("sm_90", sound | {"matrix": []}) == ["no matrix instruction"]
    assert faults("sm_90", sound | {"matrix": [], "is_matrix": False}) == []


def assert_in_order(kind: str, *flags: str) -> None:
    cases = compiled(kind, [], "--counting", "25", *flags)
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
    from aot import reordered_apart

    reshape = "%{} = tt.reshape %{} allow_reorder : tensor<64x64xi32, #{}> -> tensor<4096xi32, #linear> loc(#loc)"
    histogram = "%h = tt.histogram %a, %b : tensor<4096xi32, #linear> -> tensor<256xi32, #blocked> loc(#loc)"
    fixed = "%b = tt.reshape %2 : tensor<64x64xi1, #blocked> -> tensor<4096xi1, #linear> loc(#loc)"
    tile = reshape.format("a", "1", "mma")
    assert reordered_apart("\n".join([tile, reshape.format("b", "2", "blocked"), histogram])) == [
        "tt.histogram of #blocked and #mma"
    ]
    assert reordered_apart("\n".join([tile, reshape.format("b", "2", "mma"), histogram])) == []
    assert reordered_apart("\n".join([tile, fixed, histogram])) == []
