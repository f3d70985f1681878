"""Check the model of a step on paper: its counts, its formula, what it calls modelled and what measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as program
from bench.gpu import model
from bench.gpu.block import BLOCKS, PHASES, Step, StepSizes
from bench.gpu.measure import Ceilings
from bench.gpu.step import work

ROOT = Path(__file__).resolve().parents[2]
BLOCK = StepSizes("block", width=16, heads=2, vocabulary=11, K=6, R=2, kept=0.2, B=3, T=4)
NAMES = ["A100", "H100", "H200", "RTX 4090", "MI300"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def result(device: str, passed: bool = True) -> dict:
    """Make what `bench.gpu` writes, as far as the model reads it: phase i of BLOCK in bf16 took i ms."""
    phases = [{"name": name, "seconds": 1e-3 * i} for i, name in enumerate(PHASES, 1)]
    return {
        "environment": {"device": device},
        "checks": [{"passed": passed}],
        "ceilings": Ceilings(1e12, {"bf16": 1e14, "tf32": 5e13}, 2e-6)._asdict(),
        "steps": [{"size": BLOCK.name, "dtype": "bf16", "phases": phases}],
    }


def test_the_committed_sizes_are_modelled_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table per size and dtype with all five GPUs, a line per phase, each called modelled, totals that add up."""
    monkeypatch.setattr(model, "committed", lambda: [])
    assert program.main(["--model"]) == 0
    out, err = capsys.readouterr()
    head, *tables = out.strip().split("\n\n")
    assert err == ""
    assert "nothing below is measured" in head
    assert all(f"{name}, published rates" in head for name in NAMES)
    assert [t.split(", modelled")[0] for t in tables] == [
        f"A step of {z.name} in {d}" for z in BLOCKS for d in program.TIMED
    ]
    for each in tables:
        _, header, *lines = each.splitlines()
        assert cells(header)[-5:] == [f"{name} ms" for name in NAMES]
        assert [cells(line)[:2] for line in lines[:6]] == [["modelled", name] for name in (*PHASES, "total")]
        assert all(line.startswith("modelled") for line in lines)
        numbers = [[float(cell) for cell in cells(line)[2:]] for line in lines[:6]]
        rounding = [0.03, 0.3, 0, 0, *[0.003] * len(NAMES)]  # three times the last digit, of six rounded numbers
        for (*parts, total), off in zip(zip(*numbers, strict=True), rounding, strict=True):
            assert sum(parts) == pytest.approx(total, abs=off + 1e-9)
        assert all(row[2] > 0 and min(row[4:]) > 0 for row in numbers)  # launches, times


def test_counts_are_those_of_a_step_that_ran() -> None:
    """FLOPs and bytes on tensors of shapes only: a real step's, but for what depends on the kept coefficients."""
    counted = model.count(BLOCK, "bf16")
    step = Step(BLOCK, torch.bfloat16, torch.device("cpu"), "torch")
    step.take()
    done = work(step)
    assert list(counted) == list(PHASES)
    assert all(c.bytes > 0 and c.launches > 0 and c.waits >= 0 for c in counted.values())
    assert all((c.flops > 0) == (phase != "update") for phase, c in counted.items())
    assert counted["select"][:2] == done["select"]
    assert all(counted[phase].flops <= done[phase][0] for phase in ("loss", "backward"))
    assert counted["update"].bytes >= done["update"][1]


def test_work_of_the_extraction_and_the_update_as_counted_by_hand() -> None:
    """Products and least traffic of the block at width 2048, and eight numbers a parameter."""
    z = BLOCKS[1]
    counted = model.count(z, "bf16")
    head, square = z.vocabulary * z.width, z.width**2
    products = 2 * z.S * (4 * square + 2 * head + z.T * square)  # forward, head back, `out` back for each position
    attention = counted["extract"].flops - products
    assert 0 < attention < 0.02 * products
    factors = 4 * (z.B * z.T + z.S * z.T) * z.width  # x and dy of each matrix
    assert counted["extract"].bytes == 2 * (5 * square + 2 * head + 4 * z.S * z.vocabulary + factors)
    parameters = 2 * 4 * z.K * z.R * 2 * z.width
    assert counted["update"][:2] == (0, 8 * 2 * parameters)


def test_a_phases_time_is_the_larger_of_both_and_what_it_waits_for() -> None:
    """By hand: 4 GFLOP at 100 TFLOP/s are 40 us, 20 MB at 1 TB/s 20 us; three launches of 5 us, two waits of 20 us."""
    rates = Ceilings(1e12, {"bf16": 1e14}, 5e-6)
    counted = model.Counted(4 * 10**9, 20 * 10**6, 3, 2)
    assert model.modelled_seconds(counted, "bf16", rates) == pytest.approx(40e-6 + 15e-6 + 40e-6)
    assert model.modelled_seconds(counted._replace(bytes=10**8), "bf16", rates) == pytest.approx(100e-6 + 55e-6)
    ours = model.count(BLOCK, "tf32")["loss"]
    h100 = next(gpu for gpu in model.GPUS if gpu.name == "H100").rates
    expected = max(ours.flops / 494.7e12, ours.bytes / 3.35e12) + 5e-6 * ours.launches + 20e-6 * ours.waits
    assert model.modelled_seconds(ours, "tf32", h100) == pytest.approx(expected)


def test_measured_lines_stand_below_the_modelled_ones() -> None:
    """In their GPU's column, at its measured rates; an unknown GPU gets a column, one with a failed check no times."""
    page = model.page(
        [BLOCK], ["bf16"], [result("NVIDIA H200"), result("NVIDIA L4"), result("AMD Instinct MI300X", False)]
    )
    assert "nothing below is measured" not in page
    for line in ("H200, measured rates: bf16 100.0", "NVIDIA L4, measured", "MI300, measured", "H100, published"):
        assert f"\n{line}" in page
    _, header, *lines = page.split("\n\n")[1].splitlines()
    assert cells(header)[-6:] == [f"{name} ms" for name in [*NAMES, "NVIDIA L4"]]
    kinds = [cells(line)[:2] for line in lines]
    assert kinds[:-1] == [[kind, name] for name in (*PHASES, "total") for kind in ("modelled", "measured")]
    for i, line in enumerate(lines[1:-2:2], 1):
        assert cells(line)[2:] == ["-", "-", f"{i}.000", "-", "-", f"{i}.000"]
    assert cells(lines[-2])[2:] == ["-", "-", "15.000", "-", "-", "15.000"]


def test_results_are_those_of_gpus(tmp_path: Path) -> None:
    """Of the files in a folder, those that `bench.gpu` wrote; where there are none, none."""
    assert model.committed(tmp_path) == []
    (tmp_path / "steps.json").write_text('{"environment": {"torch": "2"}}', encoding="utf-8")
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(result("NVIDIA H200")), encoding="utf-8")
    assert model.committed(tmp_path) == [result("NVIDIA H200")]


@pytest.mark.parametrize("device", ["NVIDIA RTX A1000", "NVIDIA GH200 480GB"])
def test_a_gpu_of_a_similar_name_is_another(device: str) -> None:
    """A100 is no part of A1000, nor H200 of GH200."""
    gpus = model.with_measured([result(device)])
    assert [gpu.name for gpu in gpus] == [*NAMES, device]
    assert [gpu.source for gpu in gpus] == [*["published"] * 5, "measured"]


def test_without_triton_it_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """In a process that cannot import triton: exit status 2 and why. The help names the GPUs."""
    code = "import sys; sys.modules['triton'] = None; from bench.gpu.__main__ import main; main(['--model'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2
    assert "--model counts the kernels' launches: triton cannot be imported" in run.stderr
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in NAMES)
