"""Check the GPU benchmark: its exit without a GPU, its counts of work, and how it judges results."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import l3d_kernels as lk
from bench.gpu import __main__ as program
from bench.gpu import checks, measure, report
from bench.gpu.block import PHASES, Step, StepSizes
from bench.gpu.cases import LARGE, OPS, SMALL, Sizes, fitting, make, moved_bytes
from bench.gpu.step import count_launches, time_steps, work
from l3d.decomposition.costs import Plan
from l3d.decomposition.objective import objective
from l3d_kernels import registry

assert registry.load_kernels() == ""
from l3d_kernels.kernels.project import project  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ODD = SMALL[0][0]._replace(S=10)  # of as many coefficients as are drawn once
BLOCK = StepSizes("block", width=16, heads=2, vocabulary=11, K=6, R=2, kept=0.2, B=3, T=4)
TINY = Sizes("tiny", S=6, B=2, T=3, I=5, O=7, K=4, R=2, kept=0.4, A=3, k=2, L=9, D=11)


def inputs_of(name: str, sizes: Sizes = TINY, dtype: torch.dtype = torch.float32) -> dict:
    return make(name, sizes, dtype, CPU, torch.Generator().manual_seed(0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 0, one line, no file, with and without arguments; by the command line too."""
    before = sorted((ROOT / "bench").rglob("*.json"))
    run = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    shown = [run.stdout]
    for arguments in ([], ["--small"], ["--out", str(tmp_path / "results.json")]):
        assert program.main(arguments) == 0
        out, err = capsys.readouterr()
        assert err == ""
        shown.append(out)
    for each in shown:
        assert "no GPU" in each
        assert len(each.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    assert sorted((ROOT / "bench").rglob("*.json")) == before


def test_it_needs_only_torch_triton_and_numpy() -> None:
    """Nothing else is imported at the start; of l3d, a step takes what does without its other dependencies."""
    others = ["transformers", "matplotlib", "rich", "yaml", "safetensors", "jsonargparse", "jinja2"]
    code = f"""
import sys
from bench.gpu import __main__
print({{"l3d", *{others}}} & set(sys.modules))
sys.modules.update(dict.fromkeys({others}))
import torch
from bench.gpu.block import Step
Step(__main__.DRY_BLOCK, torch.float32, torch.device("cpu"), "torch").take()
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, "set()\n"), run.stderr


def test_every_operation_is_in_the_benchmark() -> None:
    """Those left out are other routes to the same result, choose between two that are in, or are parts of `update`."""
    left_out = {"SparseCoefficients", "gram_energy", "project", "project_tiled", "adam_step", "rescale"}
    assert set(lk.__all__) - set(OPS) <= left_out
    assert {name for name in OPS if name.startswith("project_")} >= {f"project_{path}" for path in project.PATHS}


def loops(*sizes: int) -> int:
    """Count the passes of nested loops, one by one."""
    return sum(1 for _ in itertools.product(*(range(n) for n in sizes)))


@pytest.mark.parametrize("name", ["project_fused", "project_at", "gram_energy_coactive", "sparse_decode", "batch_topk"])
def test_flops_are_counted_as_loops_would(name: str) -> None:
    """Two for each multiply-add of the definition, x.right once per sequence."""
    z, inputs = TINY, inputs_of(name)
    rows = inputs["kept"].rows.tolist() if "kept" in inputs else []
    expected = {
        "project_fused": loops(z.B, z.T, z.K, z.R, z.I) + loops(z.S, z.T, z.K, z.R, z.O),
        "project_at": min(len(rows), z.B * z.K) * loops(z.T, z.R, z.I) + len(rows) * loops(z.T, z.R, z.O),
        "gram_energy_coactive": sum(loops(z.R, z.R, z.I + z.O) for a in rows for b in rows if a == b),
        "sparse_decode": loops(z.A, z.k, z.D),
        "batch_topk": 0,
    }[name]
    assert OPS[name].flops(z, inputs) == 2 * expected


def test_flops_are_those_of_the_matrix_products_that_torch_counts() -> None:
    """Materialised operations: torch's own counter on the equivalent dense products."""
    z = TINY
    i = inputs_of("squared_residual_norm")
    with FlopCounterMode(display=False) as dense:
        v = i["left"].mT @ i["right"]
        _ = i["grad"].flatten(1) @ v.flatten(1).mT
    assert OPS["project_dense"].flops(z, i) == dense.get_total_flops()
    with FlopCounterMode(display=False) as from_kept:
        for row in range(z.S):
            columns = i["kept"].columns[i["kept"].rows == row]
            if len(columns):
                _ = i["left"][columns].flatten(0, 1).mT @ i["right"][columns].flatten(0, 1)
    assert OPS["reconstruct"].flops(z, i) == from_kept.get_total_flops()
    norm = inputs_of("squared_gradient_norm")
    with FlopCounterMode(display=False) as products:
        _ = norm["x"] @ norm["x"].mT, norm["dy"] @ norm["dy"].mT
    assert OPS["squared_gradient_norm"].flops(z, norm) == products.get_total_flops()
    longer = z._replace(T=9)
    norm = inputs_of("squared_gradient_norm", longer)
    with FlopCounterMode(display=False) as outer:
        _ = norm["dy"].mT @ norm["x"].repeat_interleave(z.S // z.B, 0)
    assert OPS["squared_gradient_norm"].flops(longer, norm) == outer.get_total_flops()


def test_bytes_are_all_inputs_and_outputs_once() -> None:
    """Indices count with eight bytes; sparse_decode reads a row of the weight for every entry."""
    z, i = TINY, inputs_of("project_fused", dtype=torch.bfloat16)
    elements = z.B * z.T * z.I + z.S * z.T * z.O + z.K * z.R * (z.I + z.O) + z.S * z.K
    assert moved_bytes(OPS["project_fused"], z, i, OPS["project_fused"].run(i, "torch")) == 2 * elements
    i = inputs_of("sparse_decode")
    expected = z.A * z.k * (8 + 4) + 4 * (z.A * z.k * z.D + z.A * z.D)
    assert moved_bytes(OPS["sparse_decode"], z, i, OPS["sparse_decode"].run(i, "torch")) == expected


def test_the_bound_is_the_larger_of_both() -> None:
    """Operations that are no matrix products are bound by the copy alone; the launch floor is taken off."""
    best = measure.Ceilings(1e12, {"bf16": 1e14}, 5e-6)
    assert measure.bound(10**9, 10**6, True, "bf16", best) == (1e-5, "matrix")
    assert measure.bound(10**6, 10**7, True, "bf16", best) == (1e-5, "copy")
    assert measure.bound(10**9, 10**6, False, "bf16", best) == (1e-6, "copy")
    assert measure.percent(1e-5, 2.5e-5, 5e-6) == pytest.approx(50)


def test_a_kernel_that_does_not_run_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception is a failed check with its message, not the end of the run."""
    monkeypatch.setattr(checks, "OPS", {"gram": OPS["gram"], "batch_topk": OPS["batch_topk"]})
    broken = OPS["gram"]._replace(run=lambda i, b: 1 / 0)
    monkeypatch.setitem(checks.OPS, "gram", broken)
    made = checks.run_all([(TINY, ("fp32",))], CPU, seed=0)
    assert [(c.op, c.passed) for c in made] == [("gram", False), ("batch_topk", True)]
    assert "ZeroDivisionError" in made[0].note


@pytest.mark.parametrize("name", OPS)
def test_checks_pass_in_the_interpreter(name: str) -> None:
    """The checks that a GPU runs, on the CPU: the kernels pass them at an odd size."""
    made = checks.check(name, ODD, "fp32", CPU, torch.Generator().manual_seed(3))
    assert made
    assert all(c.passed for c in made), made


def test_a_wrong_result_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value off by a thousandth, or not a number, does not pass; nor does a call that launches nothing."""
    exact = checks.results

    def spoiled(name: str, inputs: dict, backend: str) -> dict[str, torch.Tensor]:
        found = exact(name, inputs, backend)
        return {**found, "value": found["value"] * (1.001 if backend == "triton" else 1)}

    monkeypatch.setattr(checks, "results", spoiled)
    made = checks.check("gram", ODD, "fp32", CPU, torch.Generator().manual_seed(3))
    assert [c.what for c in made if not c.passed] == ["value"]
    assert "worst at" in made[0].note
    monkeypatch.setattr(checks, "results", lambda name, inputs, backend: exact(name, inputs, "torch"))
    (made_none,) = checks.check("gram", ODD, "fp32", CPU, torch.Generator().manual_seed(3))
    assert (made_none.passed, made_none.note) == (False, "no kernel was launched")


def test_results_of_few_elements_are_drawn_many_times() -> None:
    """A single element's twin may be exact by luck: at the smallest size no seed fails."""
    single = next(z for z, _ in SMALL if z.name == "single")
    for seed in range(12):
        made = checks.check("squared_residual_norm", single, "fp32", CPU, torch.Generator().manual_seed(seed))
        assert all(c.passed for c in made), made


def test_places_and_fields_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are not those of the places named fail, as do fields of top-k that are not the twin's."""
    real = checks.lk.project_topk

    def shifted(*arguments: object, **options: object) -> lk.SparseCoefficients:
        kept = real(*arguments, **options)
        return kept._replace(columns=kept.columns.roll(1))

    monkeypatch.setattr(checks.lk, "project_topk", shifted)
    (made,) = checks.check("project_topk", ODD, "fp32", CPU, torch.Generator().manual_seed(3))
    assert not made.passed
    assert made.note.endswith("values are not those of their places")
    topk = checks.lk.batch_topk

    def other(coefficients: torch.Tensor, n: int, backend: str) -> lk.SparseCoefficients:
        kept = topk(coefficients, n, backend=backend)
        return kept._replace(rows=kept.rows.flip(0)) if backend == "triton" else kept

    monkeypatch.setattr(checks.lk, "batch_topk", other)
    (made,) = checks.check("batch_topk", ODD, "fp32", CPU, torch.Generator().manual_seed(3))
    assert (made.passed, made.note) == (False, "differ: ['rows']")


def test_what_fails_its_check_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    """The others are, the largest sizes last, and the dtypes kept for the end after them."""
    best = measure.Ceilings(1e10, dict.fromkeys(measure.DTYPES, 1e11), 1e-6)
    failed = [name for name in OPS if name not in ("gram", "batch_topk")]
    done = program.time_all((TINY,), ("bf16",), CPU, best, float("inf"), last=("fp32",), failed=failed)
    assert {t.op for t in done} == {"gram", "batch_topk"}
    assert list(dict.fromkeys(t.dtype for t in done)) == ["bf16", "fp32"]
    assert capsys.readouterr().out == ""


def test_a_timing_is_written_and_shown(tmp_path: Path) -> None:
    """One operation is timed on the CPU, to see that the figures fit together: none of them is kept."""
    best = measure.Ceilings(1e10, dict.fromkeys(measure.DTYPES, 1e11), 1e-6)
    timings = program.time_op("gram", TINY, "fp32", CPU, best)
    assert [t.part for t in timings] == ["forward", "backward"]
    assert all(t.eager_seconds > 0 for t in timings)
    late = program.compiled_too(timings, (TINY,), CPU, deadline=0.0)
    assert [t.note for t in late] == [
        "no time was left for torch.compile",
        "the twin's backward pass is not compiled",
    ]
    assert timings[1].flops == 2 * timings[0].flops
    shown = report.table(timings, best)
    assert "ceilings: copy 10 GB/s" in shown
    assert len(shown.splitlines()) == 4
    report.write(tmp_path / "r.json", {"timings": [t._asdict() for t in timings]})
    assert (tmp_path / "r.json").read_text().startswith("{")
    assert report.path_for("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"


def test_a_compilation_that_fails_or_takes_too_long_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no figure then, and a note says why; the alarm is off afterwards."""
    monkeypatch.setattr(program, "COMPILE_LIMIT", 1)
    monkeypatch.setattr(program.torch, "compile", lambda call: call)
    seconds, note = program.compiled_seconds(lambda: time.sleep(5), CPU)
    assert (seconds, note) == (None, "torch.compile of the twin, given 1 s: TimeoutError")
    assert program.compiled_seconds(lambda: 1 / 0, CPU)[1].endswith("ZeroDivisionError")
    assert program.compiled_seconds(lambda: None, CPU)[0] is not None
    assert signal.alarm(0) == 0


def test_wide_gradients_are_of_fewer_samples() -> None:
    """Only where [S, O, I] exists, and sequences no more than samples."""
    assert fitting("project_fused", LARGE[2]) == LARGE[2]
    assert fitting("reconstruct", LARGE[2]).S == 64
    assert fitting("reconstruct", LARGE[2]._replace(I=1 << 15, O=1 << 15))[1:3] == (1, 1)


# --- whole steps ------------------------------------------------------------------------------------------------


def test_a_dry_run_goes_through_everything_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks, timings, steps, rows of paths and tables, on a CPU in the interpreter; it must be asked for.

    Two draws a check and the fewest repetitions for a figure, for time.
    """
    before = sorted((ROOT / "bench").rglob("*.json"))
    arguments = ["--dry", "--out", str(tmp_path / "results.json")]
    with monkeypatch.context() as without:
        without.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(SystemExit) as stopped:
            program.main(arguments)
    assert stopped.value.code == 2
    assert "set TRITON_INTERPRET=1" in capsys.readouterr().err
    short = "from bench.gpu import __main__ as program, checks, measure; checks.DRAWS = 2"
    short += "; measure.median_seconds.__defaults__ = (0.0,)"
    command = [sys.executable, "-c", f"import sys; {short}; sys.exit(program.main({arguments}))"]
    own = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert "FAILED" not in run.stdout
    assert {line.split()[0] for line in lines if "  backward  " in line} >= {"project_at", "gram"}
    assert lines[-3].split()[:2] == ["step", "dtype"]
    assert lines[-2].split()[:2] == ["dry", "fp32"]
    assert "no figure above means anything" in lines[-1]
    assert not list(tmp_path.iterdir())
    assert sorted((ROOT / "bench").rglob("*.json")) == before


def test_the_steps_loss_is_the_objectives() -> None:
    """The phases together are l3d's own step: the same loss, the parameters move, and the decoder has unit norm."""
    step = Step(BLOCK, torch.float32, CPU, "torch")
    moved = [p.detach().clone() for p in step.optimizer.parameters]
    sides = [[p.clone() for p in side.parameters()] for side in (step.encoder, step.decoder)]
    loss = step.take()
    assert all(not torch.equal(a, b) for a, b in zip(moved, step.optimizer.parameters, strict=True))
    norms = step.decoder.squared_norm()
    torch.testing.assert_close(norms, torch.ones_like(norms))
    with torch.no_grad():
        for side, before in zip((step.encoder, step.decoder), sides, strict=True):
            for p, value in zip(side.parameters(), before, strict=True):
                p.copy_(value)
    expected = objective(step.gradients, step.encoder, step.decoder, BLOCK.kept, Plan(backend="torch")).loss
    torch.testing.assert_close(loss, expected.detach())


def test_the_bare_passes_are_those_that_extraction_needs() -> None:
    """Torch counts as many operations in the bare passes as in the extraction: no weight gradient, nothing twice."""
    step = Step(BLOCK, torch.float32, CPU, "torch")
    step.extractor(step.tokens, step.generator)  # the first batch is run once more, to see whether the model is fixed
    with FlopCounterMode(display=False) as extraction:
        step.extractor(step.tokens, step.generator)
    with FlopCounterMode(display=False) as bare:
        step.bare()
    assert bare.get_total_flops() == extraction.get_total_flops() > 0


def test_a_phases_work_is_that_of_the_cheapest_route() -> None:
    """Counted by loops for a block whose cheapest route is known, of four tensors and two sides."""
    z = BLOCK._replace(width=16, K=40, R=1, kept=0.01)  # few kept: all pairs once, then the kept ones of both sides
    step = Step(z, torch.float32, CPU, "torch")
    step.take()
    done = work(step)
    pairs = 4 * loops(z.T, z.K, z.R, z.width) * (z.B + z.S)
    kept = 4 * 2 * loops(z.T, z.R, z.width) * (min(z.B * z.K, z.n_kept) + z.n_kept)
    assert done["select"][0] == 2 * (pairs + kept)
    assert done["backward"][0] >= 2 * 2 * kept
    parameters = 2 * 4 * z.K * z.R * 2 * z.width
    moving = len(step.kept.columns.unique())
    assert 0 < moving < z.K
    assert done["update"] == (0, 8 * 4 * parameters * moving // z.K)
    assert set(done) == set(PHASES)


def test_launches_are_counted_by_phase() -> None:
    """Every phase launches something; with kernels, theirs are among them; nothing keeps watching afterwards."""
    from l3d_kernels.kernels.shared import common

    before = len(common.WATCHERS)
    counted = {backend: count_launches(Step(BLOCK, torch.float32, CPU, backend)) for backend in ("torch", "triton")}
    assert all(set(c) == set(PHASES) and min(c.values())[0] > 0 for c in counted.values())
    assert counted["torch"]["extract"] == counted["triton"]["extract"]
    assert counted["torch"]["extract"][0] > BLOCK.T
    assert len(common.WATCHERS) == before


def test_rows_of_paths_name_the_fastest() -> None:
    """A row for each arithmetic and width class, from both passes; the twin where it is faster than both paths."""
    blank = measure.Timing("", "", "", "forward", 0.0, 0, 0, 0.0, "copy", 0.0, None, None, None)
    cases = [(LARGE[0], "bf16", 1.0, 2.0, 3.0), (LARGE[1], "tf32", 2.0, 1.0, None), (LARGE[2], "bf16", 2.0, 2.0, 1.0)]
    timings = [
        blank._replace(op=f"project_{path}", size=z.name, dtype=dtype, seconds=seconds, eager_seconds=eager)
        for z, dtype, fused, chunked, eager in cases
        for path, seconds in (("fused", fused), ("chunked", chunked))
    ]
    timings += [t._replace(part="backward") for t in timings]  # whose table is the same
    rows = dict(report.path_rows(timings, LARGE, "sm_90"))
    assert rows == {
        ("project", "sm_90", "16", "narrow"): "fused",
        ("project", "sm_90", "tf32", "wide"): "chunked",
        ("project", "sm_90", "16", "widest"): "twin",
    }
    slow = [t._replace(seconds=9.0) if t.part == "backward" and t.op == "project_fused" else t for t in timings]
    assert dict(report.path_rows(slow, LARGE, "sm_90"))["project", "sm_90", "16", "narrow"] == "chunked"


def test_a_step_that_fails_is_named_and_the_others_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A size whose heads do not divide its width: one line, and the next size is timed."""
    best = measure.Ceilings(1e10, dict.fromkeys(measure.DTYPES, 1e11), 1e-6)
    blocks = [BLOCK._replace(name="broken", heads=3), BLOCK]
    (done,) = time_steps(blocks, ["fp32"], CPU, best, float("inf"), backend="torch", steps=1, warm_up=0)
    assert "FAILED the step of broken in fp32" in capsys.readouterr().out
    assert (done.size, done.peak_bytes, [p.name for p in done.phases]) == ("block", None, list(PHASES))
    assert done.roofline_seconds == pytest.approx(sum(p.roofline_seconds for p in done.phases))
    assert all(p.roofline_seconds >= p.launches * best.launch_seconds > 0 for p in done.phases)
    assert time_steps(blocks, ["fp32"], CPU, best, 0.0) == []
