"""Check the parts of the benchmarks: gate, providers, counts, exponents, tables and the page."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from bench import scaling
from bench.measure import gate, peak
from bench.measure.counting import Counts, Rates, count
from bench.measure.drawings import ratios, scaling_curves
from bench.measure.environment import described
from bench.memory import exponent
from bench.methods.providers import PROVIDERS, PUBLIC, TINY, inputs_of, outcome_of, prepared, truth_of
from bench.methods.scaling_cases import AXES, QUANTITIES
from bench.scale import Case
from bench.suites import run as suites
from bench.suites import test_decomposition, test_ops
from l3d.report.plots import to_svg
from l3d.training.memory import memory_now

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks" / "performance.md"


def written(name: str) -> dict[str, Any]:
    """Read one of the committed results."""
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


# --- the gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", PUBLIC)
def test_a_provider_computes_the_operation(name: str, provider: str) -> None:
    """Value and gradients by every formula, and by the kernels in the interpreter, pass the gate at a tiny size."""
    if provider not in PUBLIC[name].providers():
        with pytest.raises(ValueError, match=f"provider: expected one of published, l3d torch.*, got '{provider}'"):
            PUBLIC[name].by(provider)
        return
    inputs = inputs_of(name, TINY, CPU)
    gate.check(provider, outcome_of(name, inputs, provider), truth_of(name, inputs))


def test_a_wrong_provider_is_refused() -> None:
    """A value, a gradient or a shape that is off, and what is not a number: an error that says who and where."""
    inputs = inputs_of("project", TINY, CPU)
    truth = truth_of("project", inputs)
    right = outcome_of("project", inputs, "afternoon")
    gate.check("a", right, truth)
    for what in truth:
        scale = float(truth[what].abs().max())
        for wrong in (right[what] + 5e-5 * scale, right[what] * torch.nan):
            with pytest.raises(gate.Refused, match=f"project by x, {what}: off by .*; not timed"):
                gate.check("project by x", right | {what: wrong}, truth)
    with pytest.raises(gate.Refused, match=r"value: shape \[4\], expected \[4, 6\]"):
        gate.check("x", right | {"value": right["value"][:, 0]}, truth)
    with pytest.raises(gate.Refused, match="loss: off by"):
        gate.check_loss("x", 0.502, torch.tensor(0.5))
    gate.check_loss("x", torch.tensor(0.5002, requires_grad=True), 0.5)


def test_a_refused_provider_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's own test ends at the gate, and times nothing; with the right formula it times one call."""
    timed: list[Any] = []
    benchmark = Mock(side_effect=timed.append, enabled=False, extra_info={})
    right = PUBLIC["reconstruct"]
    assert right.afternoon is not None
    monkeypatch.setitem(PUBLIC, "reconstruct", right._replace(afternoon=lambda i: 1.01 * right.truth(i)))
    with pytest.raises(gate.Refused, match="reconstruct by afternoon, tiny, value: off by"):
        test_ops.test_op(benchmark, "reconstruct", "width 64", "forward", "afternoon")
    assert (timed, benchmark.extra_info) == ([], {})
    monkeypatch.setitem(PUBLIC, "reconstruct", right)
    test_ops.test_op(benchmark, "reconstruct", "width 64", "forward", "afternoon")
    assert len(timed) == 1
    assert benchmark.group == "reconstruct, width 64, forward"
    assert benchmark.extra_info["provider"] == "afternoon"
    assert benchmark.extra_info["flops"] == 2 * TINY.n_kept * TINY.R * TINY.I * TINY.O


def test_a_run_that_learns_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside what is timed, so that pytest-benchmark leaves its time out."""
    monkeypatch.setattr(test_decomposition, "ours", lambda n: (0.8, 0.75))
    with pytest.raises(gate.Refused, match=r"200 steps by l3d torch: the error went from 0\.800 to 0\.750"):
        test_decomposition.prepared("l3d torch", 1)()
    monkeypatch.setattr(test_decomposition, "loop", lambda method: (0.8, 0.7))
    test_decomposition.prepared("published", 1)()


def test_of_a_run_what_is_compared_is_kept() -> None:
    """Medians, spreads and what was counted, with our own account of the machine."""
    stats = {"median": 2.0, "iqr": 0.1, "min": 1.5, "rounds": 5, "data": [2.0] * 5, "stddev": 0.1}
    info = {"provider": "l3d torch", "flops": 7, "sizes": {"S": 4}}
    file = {"machine_info": {"node": "x", "l3d": {"cores": 2}}, "benchmarks": [{"group": "g", "name": "t"}]}
    file["benchmarks"][0] |= {"stats": stats, "extra_info": info}  # type: ignore[index]
    row = {"group": "g", "provider": "l3d torch", "median": 2.0, "iqr": 0.1, "min": 1.5, "rounds": 5, "flops": 7}
    assert suites.compact(file) == {"environment": {"cores": 2}, "rows": [row]}


# --- measures -------------------------------------------------------------------------------------------------------


def held(n_bytes: int) -> Any:
    return partial(bytearray, n_bytes)


def broken() -> Any:
    raise ValueError("no")


@pytest.mark.skipif(not memory_now(), reason="the system does not tell a process's memory")
def test_the_peak_is_what_the_call_adds() -> None:
    """In a process of its own, whatever this one holds; a process that fails is told."""
    of_this_process = bytearray(b"x") * (400 << 20)
    found = peak.of(held, 100 << 20)
    assert 100 << 20 <= found < 120 << 20
    assert len(of_this_process) == 400 << 20
    with pytest.raises(RuntimeError, match="broken"):
        peak.of(broken)


def test_a_call_for_the_peak_runs() -> None:
    """What the suites of operations hand to another process is the pass that they time."""
    assert prepared("gram_energy", "width 64", "forward", "l3d torch")().shape == (256,)
    assert len(prepared("gram_energy", "width 64", "backward", "published")()) == 3


def test_counts_are_those_of_the_products() -> None:
    """FLOPs of a product in place and not, bytes of what is read and written; views and empties are nothing."""
    a, b, out, rows = torch.ones(3, 4), torch.ones(4, 5), torch.zeros(3, 5), torch.tensor([2, 0])
    assert count(lambda: a @ b) == Counts(2 * 60, 4 * (12 + 20 + 15), 1)
    assert count(lambda: out.addmm_(a, b)) == Counts(2 * 60, 4 * (15 + 12 + 20 + 15), 1)
    assert count(lambda: a.mT.flatten(0)[2:].view(5, 2)) == Counts(0, 4 * 24, 1)  # one copy
    assert count(lambda: torch.empty(9).expand(3, 9)) == Counts(0, 0, 0)
    assert count(lambda: a[rows]) == Counts(0, 2 * 4 * 8 + 8 * 2, 1)  # two rows read and written, and their indices
    assert Rates(10.0, 5.0, 1.0).seconds(Counts(20, 15, 2)) == 2 + 3 + 2


@pytest.mark.parametrize("name", ["projection", "gram energy", "extraction"])
def test_the_formula_is_what_torch_counts(name: str) -> None:
    """Multiply-adds by formula are half of the FLOPs counted, to what the formula leaves out: sums over positions."""
    case = Case(width=96, S=64, T=4, K=12, R=3)
    work = QUANTITIES[name].prepare(case)
    assert 1 <= count(work.call).flops / (2 * work.cost) < 1.02


def test_exponents() -> None:
    """Of a power law exactly, whatever its factor; of a sum of two the slope between them."""
    xs = [1.0, 2.0, 4.0, 8.0]
    assert exponent(xs, [3 * x**1.7 for x in xs]) == pytest.approx(1.7)
    assert 1 < exponent(xs, [x + x**2 for x in xs]) < 2
    assert exponent(xs, [5.0] * 4) == 0


def test_every_axis_has_its_sizes_about_the_base() -> None:
    """Five sizes, of which the middle one is the base, and only one of the sizes changes along an axis."""
    for quantity in QUANTITIES.values():
        for axis, cases in quantity.cases().items():
            assert cases[2] == quantity.base
            assert [getattr(case, axis) / getattr(quantity.base, axis) for case in cases] == [0.25, 0.5, 1, 2, 4]
            assert {case._replace(**{axis: 0}) for case in cases} == {quantity.base._replace(**{axis: 0})}


def test_scaling_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one quantity at tiny sizes, with everything that table and picture need."""
    monkeypatch.setattr(scaling, "SECONDS", 0.0)
    small = QUANTITIES["step"]._replace(base=Case(64, 8, 4, 8, 4))
    rows = scaling.measure("step", small, Rates(1e9, 1e9, 1e-6))
    assert [row["axis"] for row in rows] == list(AXES)
    assert all(row["rounds"] == scaling.ROUNDS and min(row["seconds"]) > 0 for row in rows)
    assert all(a <= b for row in rows for a, b in zip(row["seconds"], row["medians"], strict=True))
    assert scaling.table(rows).splitlines()[2].startswith("| step | S 8, T 4, K 8, R 4, width 64 | ")
    assert "step, ms" in to_svg(scaling_curves(rows))


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [scaling, suites], ids=["scaling", "suites"])
def test_the_page_holds_what_the_bench_wrote(module: Any) -> None:
    """Each table of docs/benchmarks/performance.md is made of the committed results, with the machine they are of."""
    found = written(module.FILE.stem)
    shown = PAGE.read_text(encoding="utf-8").split(module.MARKS[0] + "\n")[1].split(module.MARKS[1])[0]
    assert shown == described(found["environment"]) + "\n\n" + module.table(found["rows"])


def test_the_results_are_whole() -> None:
    """No group without all its providers on a CPU, nor an operation without a group; every quantity on every axis."""
    rows = written("suites")["rows"]
    groups: dict[str, set[str]] = {}
    for row in rows:
        assert row["median"] >= row["min"] > 0
        groups.setdefault(row["group"], set()).add(row["provider"])
    operations = {group.partition(",")[0] for group in groups}
    assert set(PUBLIC) | {"extraction", "one step"} <= operations
    for group, providers in groups.items():
        own = PUBLIC.get(group.partition(",")[0])
        expected = {"published", "afternoon", "l3d torch"} if own is None else {*own.providers()} - {"l3d triton"}
        assert providers == expected or "restarts" in group
    axes = {(row["quantity"], row["axis"]) for row in written("scaling")["rows"]}
    assert axes == {(name, axis) for name, quantity in QUANTITIES.items() for axis in quantity.axes}
    assert all(row | scaling.exponents(row) == row for row in written("scaling")["rows"])


@pytest.mark.parametrize("draw, name", [(scaling_curves, "scaling"), (ratios, "suites")], ids=["scaling", "suites"])
def test_the_pictures_are_drawn_of_the_results(draw: Any, name: str) -> None:
    """The same picture twice, to the byte, without a date, and it names what is in the file."""
    rows = written(name)["rows"]
    first = to_svg(draw(rows))
    assert first == to_svg(draw(rows))
    assert "date" not in first.lower()
    named = {row["quantity"] + ", ms" for row in rows} if name == "scaling" else {row["group"] for row in rows}
    committed = (PAGE.parent / f"{name}.svg").read_text(encoding="utf-8")
    assert all(f">{each}<" in first and f">{each}<" in committed for each in named)


def test_the_drawings_can_be_imported_without_matplotlib() -> None:
    """It is imported when something is drawn."""
    code = "import sys; sys.modules['matplotlib'] = None; import bench.measure.drawings, bench.suites, bench.scaling"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": "."})
