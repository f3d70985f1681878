"""Run sweeps: which runs there are, that none is done twice, and what the table shows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import l3d
from l3d.api import Decomposition
from l3d.cli.main import main
from l3d.studies.sweep import Point, points, records, run_sweep, to_markdown, write_results

SHAPES = {"w": torch.Size([4, 3])}
OVER = {"seed": [0, 1], "k": [0.1, 0.2]}


class Stub:
    """Pretends to train: saves a decomposition of the point's seed, and takes note of what was asked for."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.asked: list[tuple[str, bool]] = []
        self.stop_at = stop_at

    def __call__(self, folder: Path, point: Point, resume: bool) -> Mapping[str, Any]:
        self.asked.append((point.name, resume))
        if len(self.asked) == self.stop_at:
            (folder / "checkpoints" / "step000000010").mkdir(parents=True)
            raise KeyboardInterrupt
        seed = point.values.get("seed", 0) + 100 * point.random_weights
        Decomposition(SHAPES, 3, 1, generator=torch.Generator().manual_seed(seed)).save(folder)
        k = point.values.get("k", 0.1)
        return {"error": 1 - k - 0.01 * seed, "kept_per_sample": 30 * k, "dead_fraction": 0.0, "seconds": 2.0}


def test_points_are_every_combination_seeds_innermost() -> None:
    """In one order whatever the order given, with a control behind each where it is asked for."""
    assert [p.name for p in points(OVER)] == ["k=0.1,seed=0", "k=0.1,seed=1", "k=0.2,seed=0", "k=0.2,seed=1"]
    assert [p.name for p in points({"rank": [2, "auto"]}, True)] == [
        "rank=2",
        "rank=2,random",
        "rank=auto",
        "rank=auto,random",
    ]


@pytest.mark.parametrize(
    "over, message",
    [
        ({"steps": [1]}, "over: expected lists for some of k, n_subnetworks, rank, seed, got 'steps'"),
        ({"k": []}, r"over.k: expected a list of different values, got \[\]"),
        ({"k": [0.1, 0.1]}, "over.k: expected a list of different values"),
        ({"k": 0.1}, "over.k: expected a list of different values, got 0.1"),
        ({"rank": [{"*": 2}]}, "over.rank: expected numbers"),
    ],
)
def test_what_cannot_be_swept_over_is_refused(over: dict[str, Any], message: str) -> None:
    """A mistake is named before anything runs."""
    with pytest.raises(ValueError, match=message):
        points(over)


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """Finished runs are kept, the interrupted one goes on from its checkpoint, and values may be added later."""
    first, second, third = Stub(stop_at=3), Stub(), Stub()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path / "s", {"steps": 20}, points(OVER), first)
    assert [name for name, _ in first.asked] == ["k=0.1,seed=0", "k=0.1,seed=1", "k=0.2,seed=0"]
    run_sweep(tmp_path / "s", {"steps": 20}, points(OVER), second)
    assert second.asked == [("k=0.2,seed=0", True), ("k=0.2,seed=1", False)]
    run_sweep(tmp_path / "s", {"steps": 20}, points(OVER | {"seed": [0, 1, 2]}), third)
    assert [name for name, _ in third.asked] == ["k=0.1,seed=2", "k=0.2,seed=2"]


def test_another_sweeps_folder_is_refused(tmp_path: Path) -> None:
    """Other settings, or a folder of something else: nothing in it is touched."""
    run_sweep(tmp_path / "s", {"steps": 20}, points({"k": [0.1]}), Stub())
    with pytest.raises(ValueError, match="holds a sweep with other steps, rank"):
        run_sweep(tmp_path / "s", {"steps": 30, "rank": 2}, points({"k": [0.1]}), Stub())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds no sweep"):
        run_sweep(tmp_path / "mine", {}, points({"k": [0.1]}), Stub())
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_the_table_averages_over_seeds_and_compares_them(tmp_path: Path) -> None:
    """Error and the like are means over seeds, `alike` the mean matched |cos| of each pair of runs."""
    runs = points(OVER, random_weights=True)
    found = run_sweep(tmp_path / "s", {}, runs, Stub())
    d = [Decomposition(SHAPES, 3, 1, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    flat = [torch.stack([each.subnetwork(i)["w"].flatten() for i in range(3)]) for each in d]
    cos = (flat[0] @ flat[1].mT).abs()
    best = max(
        sum(float(cos[i, p[i]]) for i in range(3)) / 3
        for p in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    )
    trained = [each for each in found if not each.point.random_weights]
    assert [each.alike for each in trained] == pytest.approx([best] * 4, abs=1e-6)
    lines = to_markdown(found).splitlines()
    assert lines[0] == "| k | weights | runs | error | kept | dead | alike | s |"
    assert lines[2].startswith("| 0.1 | trained | 2 | .895 | 3 | 0 | ")
    assert lines[3].startswith("| 0.1 | redrawn | 2 | -.105 | 3 | 0 | ")
    assert len(lines) == 6
    paths = write_results(tmp_path / "s", {}, found)
    assert [path.name for path in paths] == ["sweep.json", "table.md", "error-kept.svg", "error-kept.png"]
    rows = json.loads(paths[0].read_text())["runs"]
    assert [row["folder"] for row in rows] == [f"runs/{point.name}" for point in runs]
    assert records(tmp_path / "s", runs) == found


class Failing(Stub):
    """Fails at some runs, each in its own way."""

    def __init__(self, failures: Mapping[str, BaseException]) -> None:
        super().__init__()
        self.failures = failures

    def __call__(self, folder: Path, point: Point, resume: bool) -> Mapping[str, Any]:
        metrics = super().__call__(folder, point, resume)
        if point.name in self.failures:
            raise self.failures[point.name]
        return metrics


FAILURES = {
    "k=0.1,seed=0": ValueError("step 3: gradients: NaN or infinity in those of 'w'"),
    "k=0.1,seed=1": torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate 2 | 3 GiB"),
    "k=0.2,seed=0": ZeroDivisionError(),
    "k=0.3,seed=1": KeyError("a model's own"),
}
REASONS = {
    "k=0.1,seed=0": "step 3: gradients: NaN or infinity in those of 'w'",
    "k=0.1,seed=1": "CUDA out of memory. Tried to allocate 2 | 3 GiB",
    "k=0.2,seed=0": "ZeroDivisionError",
    "k=0.3,seed=1": '"a model\'s own"',
}


def test_a_sweep_goes_on_after_a_run_that_fails(tmp_path: Path) -> None:
    """Each row says in one line why its run failed; the others' figures are theirs, and the next call tries again."""
    runs, said = points({"seed": [0, 1], "k": [0.1, 0.2, 0.3]}), list[str]()
    found = run_sweep(tmp_path / "s", {}, runs, Failing(FAILURES), said.append)
    assert {each.point.name: each.failure for each in found if each.failure} == REASONS
    assert [line.partition("failed: ")[2] for line in said if "failed" in line] == list(REASONS.values())
    assert [bool(each.metrics) for each in found] == [point.name not in FAILURES for point in runs]
    head, _, *rows = to_markdown(found).splitlines()
    assert head == "| k | weights | runs | error | kept | dead | alike | s | failed |"
    assert rows == [
        "| 0.1 | trained | 0 of 2 |  |  |  |  |  | seed 0: step 3: gradients: NaN or infinity in those of 'w'; "
        r"seed 1: CUDA out of memory. Tried to allocate 2 \| 3 GiB |",
        "| 0.2 | trained | 1 of 2 | .790 | 6 | 0 |  | 2 | seed 0: ZeroDivisionError |",
        '| 0.3 | trained | 1 of 2 | .700 | 9 | 0 |  | 2 | seed 1: "a model\'s own" |',
    ]
    paths = write_results(tmp_path / "s", {}, found)
    assert [path.name for path in paths] == ["sweep.json", "table.md", "error-kept.svg", "error-kept.png"]
    written = {row["folder"]: row.get("failure") for row in json.loads(paths[0].read_text())["runs"]}
    assert written == {f"runs/{point.name}": REASONS.get(point.name) for point in runs}
    again = Stub()
    assert not any(each.failure for each in run_sweep(tmp_path / "s", {}, runs, again))
    assert [name for name, _ in again.asked] == list(FAILURES)


def test_a_sweep_of_which_every_run_fails_has_a_table(tmp_path: Path) -> None:
    runs = points(OVER)
    found = run_sweep(tmp_path / "s", {}, runs, Failing({point.name: ValueError("no") for point in runs}))
    write_results(tmp_path / "s", {}, found)
    assert (tmp_path / "s" / "table.md").read_text().count("seed 0: no; seed 1: no") == 2


@pytest.mark.parametrize("damage", ["metrics.json", "decomposition.json", "decomposition.safetensors"])
def test_a_finished_run_that_cannot_be_read_is_named(tmp_path: Path, damage: str) -> None:
    """The others are tabulated and compared."""
    runs = points({"seed": [0, 1, 2]})
    whole = run_sweep(tmp_path / "s", {}, runs, Stub())
    (tmp_path / "s" / "runs" / "seed=1" / damage).write_bytes(b"{")
    found = records(tmp_path / "s", runs)
    assert [bool(each.failure) for each in found] == [False, True, False]
    assert damage.partition(".")[0] in found[1].failure
    assert found[0].metrics == whole[0].metrics
    assert found[0].alike == found[2].alike != whole[0].alike


def test_only_a_users_interruption_ends_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path / "s", {}, points(OVER), Failing({"k=0.1,seed=1": KeyboardInterrupt()}))


def test_the_command_says_that_runs_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, with table and figures of the runs that did not fail; once nothing fails, status 0."""
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", "--toy", "tms", "--steps", "12", "--n_restarts", "1", "--evaluate_rows", "64", "--out", "s"]
    arguments += ["--over.k", "[.1,.3]", "--over.seed", "[0,1]"]
    decompose = l3d.decompose

    def failing(*data: Any, **chosen: Any) -> Decomposition:
        if (chosen["k"], chosen["seed"]) in ((0.1, 1), (0.3, 0)):
            raise RuntimeError("the model's\nown error")
        return decompose(*data, **chosen)

    with monkeypatch.context() as patch:
        patch.setattr("l3d.decompose", failing)
        assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith("l3d: error: 2 of 4 runs failed; s/table.md says why")
    assert printed.out.count("seed 1: the model's own error") == printed.out.count("seed 0: the model's own error") == 1
    assert {"table.md", "sweep.json", "error-kept.svg"} <= {path.name for path in Path("s").iterdir()}
    assert main(arguments) == 0
    assert "failed" not in Path("s/table.md").read_text()


def test_the_command_sweeps_a_toy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its runs are those of `decompose` with the same settings, the control of the redrawn model; twice is once."""
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", "--toy", "tms", "--steps", "12", "--n_restarts", "1", "--evaluate_rows", "64"]
    arguments += ["--over.k", "[.1,.3]", "--over.rank", "[auto]", "--random_weights", "--out", "s"]
    assert main(arguments) == 0
    capsys.readouterr()
    toy = l3d.toys.make("tms")
    chosen = toy.settings | {"n_restarts": 1, "steps": 12, "rank": 1, "callbacks": []}
    for k in (0.1, 0.3):
        d = l3d.decompose(toy.model, toy.data, **chosen | {"k": k})
        again = l3d.load(f"s/runs/k={k},rank=auto")
        assert all(torch.equal(a, b) for a, b in zip(d.parameters(), again.parameters(), strict=True))
        with l3d.analysis.controls.redrawn(toy.model):
            d = l3d.decompose(toy.model, toy.data, **chosen | {"k": k})
        again = l3d.load(f"s/runs/k={k},rank=auto,random")
        assert all(torch.equal(a, b) for a, b in zip(d.parameters(), again.parameters(), strict=True))
    metrics = json.loads(Path("s/runs/k=0.3,rank=auto/metrics.json").read_text())
    assert {"error", "kept_per_sample", "dead_fraction", "seconds", "mmcs"} <= set(metrics)
    assert main(arguments) == 0
    assert capsys.readouterr().out.count(": kept") == 4
    for wrong, message in (
        (["sweep", "--toy", "tms", "--over.k", "[.1]", "--steps", "13", "--out", "s"], "sweep with other steps"),
        (["sweep", "--toy", "tms"], "--over: expected at least one list"),
        (["sweep", "--toy", "tms", "--over.k", "[.1,2]"], "over.k: expected a fraction in (0, 1], got 2"),
        (["sweep", "--toy", "tms", "--over.rank", "[0]"], "over.rank: expected a positive whole number, got 0"),
        (["sweep", "--over.k", "[.1]"], "--model SPEC is required, or --toy NAME"),
        (["sweep", "--toy", "tms", "--model", "hf:x", "--over.k", "[.1]"], "--model: a toy has its own model"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_a_sweeps_runs_are_run_folders_like_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every other command takes one: the toy is that of the sweep's seed, whatever the run's own is."""
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", "--toy", "tms", "--steps", "12", "--n_restarts", "1", "--evaluate_rows", "64"]
    assert main([*arguments, "--over.seed", "[3,5]", "--random_weights", "--out", "s"]) == 0
    weights = [l3d.load(f"s/runs/seed={seed},random").base_model["parameters"] for seed in (3, 5)]
    assert weights[0] == weights[1]  # of one network: else how alike they are would be no figure of seeds
    assert weights[0] != l3d.load("s/runs/seed=3").base_model["parameters"]
    for name in ("seed=3", "seed=3,random"):
        run = Path("s/runs") / name
        metrics = json.loads((run / "metrics.json").read_text())
        assert {"steps_per_second", "peak_memory_bytes", "environment"} <= set(metrics)
        assert ("mmcs" in metrics) is ("random" not in name)
        for command in (["report"], ["resume"], ["evaluate", "--describe", "300"], ["intervene"]):
            assert main([command[0], str(run), *command[1:]]) == 0, capsys.readouterr().err
        again = json.loads((run / "metrics.json").read_text())
        assert again["error"] == metrics["error"]
        assert {"report.html", "subnetworks.json", "interventions.json"} <= {path.name for path in run.iterdir()}
        assert main(["toy", "--config", str(run / "config.yaml"), "--out", f"again {name}"]) == 0
        same = [l3d.load(folder) for folder in (run, f"again {name}")]
        assert all(torch.equal(a, b) for a, b in zip(*(d.parameters() for d in same), strict=True))


def test_a_models_runs_are_run_folders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model and data of one's own: what config.yaml names is loaded again, its held-out rows and control included."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torch\n"
        "def model():\n    torch.manual_seed(0)\n    return torch.nn.Linear(4, 3)\n"
        "def points(n=60):\n    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1))\n"
    )
    arguments = ["sweep", "--model", "python:mine:model", "--data", "python:mine:points", "--data_args.n", "50"]
    arguments += ["--held_out", "20", "--rank", "1", "--steps", "5", "--over.n_subnetworks", "[3]", "--random_weights"]
    assert main([*arguments, "--out", "s"]) == 0
    for name in ("n_subnetworks=3", "n_subnetworks=3,random"):
        run = Path("s/runs") / name
        before = json.loads((run / "metrics.json").read_text())
        assert main(["evaluate", str(run), "--describe", "0"]) == 0
        after = json.loads((run / "metrics.json").read_text())
        assert (after["error"], after["held_out_error"]) == (before["error"], before["held_out_error"])
