"""A run folder holds all that is needed to look at a run, to repeat it and to go on with it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import l3d
from l3d import commands
from l3d.cli import main
from l3d.toys import suite

METRICS = {
    "error",
    "kept_per_sample",
    "dead_fraction",
    "activation_rate",
    "seconds",
    "steps_per_second",
    "peak_memory_bytes",
    "n_rows",
}

USER = """
import pathlib

import torch
from torch.utils.data import Dataset


def model():
    generator = torch.Generator().manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layers


def points(seed=0, n=60):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def batches():
    return [points(0, 16), points(1, 16), points(2, 16)]


def texts_model():
    return torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7))


def ragged():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(7, (8, length), generator=generator) for length in (3, 5, 4)]


class Interrupting(Dataset):
    # Rows that are the same as points(), until so many have been read; then Ctrl-C, once.
    def __init__(self, after):
        self.rows, self.after, self.done = points(), after, pathlib.Path("interrupted")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.after -= 1
        if self.after < 0 and not self.done.exists():
            self.done.touch()
            raise KeyboardInterrupt
        return self.rows[i]
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A module of the user's in the working directory; returns arguments that decompose its model quickly."""
    name = f"user_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    sources = ["--model", f"python:{name}:model", "--data", f"python:{name}:points"]
    return ["decompose", *sources, "--n_subnetworks", "6", "--rank", "1", "--steps", "30"]


def read(run: str) -> dict[str, Any]:
    """Read a run's metrics."""
    return json.loads(Path(run, "metrics.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command line that must fail with status 2 and one line; return the line."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if "Loading weights" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("l3d: error: ")
    return lines[0].removeprefix("l3d: error: ")


def test_toy_writes_a_whole_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A toy run leaves configuration, decomposition, figures and report, and prints where."""
    run = str(tmp_path / "run")
    assert main(["toy", "tms", "--steps", "100", "--out", run]) == 0
    printed = capsys.readouterr().out
    metrics = read(run)
    assert set(metrics) >= METRICS | {"mmcs"}
    assert 0 < metrics["error"] < 1
    assert 0 < metrics["mmcs"] <= 1
    assert metrics["n_rows"] == 1000
    assert len(metrics["activation_rate"]) == 5
    # What is kept per sample is what the subnetworks are kept for, summed.
    assert sum(metrics["activation_rate"]) == pytest.approx(metrics["kept_per_sample"], rel=1e-6)
    assert metrics["peak_memory_bytes"] > 2**20
    assert f"{run}/metrics.json" in printed
    assert f"{run}/report.html" in printed
    assert "<html" in Path(run, "report.html").read_text(encoding="utf-8")
    assert l3d.load(run).n_subnetworks == 5


def test_a_cache_is_found_from_anywhere(user: list[str], tmp_path: Path) -> None:
    """A relative --cache is written to config.yaml as the folder that it meant, so a run resumed elsewhere finds it."""
    assert main([*user, "--cache", "store", "--out", "run"]) == 0
    cache = yaml.safe_load(Path("run/config.yaml").read_text())["cache"]
    assert Path(cache).is_absolute()
    assert (Path(cache), Path(cache).is_dir()) == ((tmp_path / "store").resolve(), True)


def test_a_runs_configuration_repeats_it(tmp_path: Path) -> None:
    """config.yaml gives the same figures again, and what stands after it on the command line overrides it."""
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    assert main(["toy", "tms", "--steps", "40", "--k", ".2", "--seed", "3", "--out", first]) == 0
    config = yaml.safe_load(Path(first, "config.yaml").read_text())
    assert (config["name"], config["steps"], config["k"], config["seed"], config["rank"]) == (
        "tms",
        40,
        0.2,
        3,
        1,
    )
    assert main(["toy", "--config", f"{first}/config.yaml", "--out", second]) == 0
    assert main(["toy", "--config", f"{first}/config.yaml", "--steps", "41", "--out", third]) == 0
    timed = {"seconds", "steps_per_second", "peak_memory_bytes"}
    figures = [{key: value for key, value in read(run).items() if key not in timed} for run in (first, second, third)]
    assert figures[0] == figures[1]
    assert figures[0]["error"] != figures[2]["error"]


def test_decompose_keeps_the_held_out_rows_apart(user: list[str]) -> None:
    """The last rows are not trained on: changing them changes the held-out error only."""
    for run, n in (("a", 60), ("b", 61)):
        arguments = ["--held_out", str(n - 50), "--data_args.n", str(n), "--out", run]
        assert main([*user, *arguments]) == 0
        assert read(run)["n_rows"] == 50
        assert set(read(run)) >= METRICS | {"held_out_error"}
    assert read("a")["error"] == read("b")["error"]
    assert read("a")["held_out_error"] != read("b")["held_out_error"]


def test_evaluate_rows_bounds_the_evaluation(user: list[str]) -> None:
    """--evaluate_rows takes evenly spaced rows, and all where there are fewer."""
    assert main([*user, "--evaluate_rows", "20", "--out", "run"]) == 0
    assert read("run")["n_rows"] == 20
    assert main(["evaluate", "run", "--evaluate_rows", "5000"]) == 0
    assert read("run")["n_rows"] == 60


def test_batches_of_the_users_own(user: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Data that comes in batches is trained and evaluated on as it is; its rows are not counted, nor held out."""
    user[user.index("--data") + 1] = user[user.index("--data") + 1].replace(":points", ":batches")
    assert "needs data whose rows can be counted" in refusal(capsys, [*user, "--held_out", "5", "--out", "run"])
    assert main([*user, "--out", "run"]) == 0
    assert 0 < read("run")["error"] < 1
    assert read("run")["n_rows"] is None


def test_rows_that_cannot_be_shown_together_leave_the_figures(
    user: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches of texts of several lengths are trained on and scored; only the cards are left out, and that is said."""
    name = user[2].split(":")[1]
    sources = ["--model", f"python:{name}:texts_model", "--data", f"python:{name}:ragged", "--divergence", "kl"]
    assert main([*user, *sources, "--steps", "5", "--batch_size", "8", "--out", "run"]) == 0
    assert "no descriptions of subnetworks: data: " in capsys.readouterr().err
    assert read("run")["error"] > 0
    assert not Path("run", "subnetworks.json").exists()
    assert Path("run", "report.html").exists()


def test_of_several_processes_the_first_copies_a_run(user: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others find the copy there already, and neither refuse it nor copy again."""
    assert main([*user, "--steps", "2", "--out", "run"]) == 0
    Path("copy").mkdir()
    Path("copy", "config.yaml").touch()
    with pytest.raises(ValueError, match="--out: copy exists"):
        commands.find_run({"run": "run", "out": "copy"})
    monkeypatch.setenv("RANK", "1")
    assert commands.find_run({"run": "run", "out": "copy"}) == (Path("run"), Path("copy"))


def test_evaluate_repeats_the_runs_figures(user: list[str], tmp_path: Path) -> None:
    """Evaluating again, from another working directory's copy too, gives the training's own figures."""
    assert main([*user, "--held_out", "10", "--out", "run"]) == 0
    first = read("run")
    assert main(["evaluate", "run"]) == 0
    assert read("run") == first
    assert main(["evaluate", "run", "--out", "copy"]) == 0
    assert read("copy") == first


def test_evaluate_on_other_data_says_so(user: list[str]) -> None:
    """Figures of other data name it, keep the training's times, and hold no held-out error of the old."""
    assert main([*user, "--held_out", "10", "--out", "run"]) == 0
    first = read("run")
    data = user[user.index("--data") + 1]
    assert main(["evaluate", "run", "--data", data, "--data_args.seed", "7", "--out", "other"]) == 0
    other = read("other")
    assert other["error"] != first["error"]
    assert other["evaluated_on"] == data
    assert "held_out_error" not in other
    assert other["seconds"] == first["seconds"]
    assert read("run") == first


def test_bad_input_writes_nothing(user: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What the model or the data do not bear out is found before a run folder exists."""
    data = user[user.index("--data") + 1]
    for arguments, message in {
        ("--params", "nothing.*"): "params: no parameter matches 'nothing.*'",
        ("--held_out", "60"): "--held_out: cannot keep 60 of 60 rows out of training",
        ("--k", "1.5"): "k: expected",
        ("--device", "nowhere"): "--device: nowhere cannot be used",
        ("--data_args.m", "5"): "arguments it takes: seed, n",
        ("--data", f"{data}s"): "has no 'pointss'",
    }.items():
        assert message in refusal(capsys, [*user, *arguments, "--out", "run"])
        assert not Path("run").exists()


def test_a_run_folder_is_never_mixed_with_another(user: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds something is refused and left alone; --overwrite replaces it, and is forgotten."""
    Path("run").mkdir()
    Path("run", "mine.txt").write_text("mine")
    assert "run" in refusal(capsys, [*user, "--out", "run"])
    assert [path.name for path in Path("run").iterdir()] == ["mine.txt"]
    assert main([*user, "--out", "first"]) == 0
    Path("first", "interventions.json").write_text("{}")  # of the run that goes
    Path("first", "mine.txt").write_text("mine")
    assert main([*user, "--out", "first", "--seed", "1", "--overwrite"]) == 0
    assert not Path("first", "interventions.json").exists()
    assert Path("first", "mine.txt").exists()
    config = yaml.safe_load(Path("first", "config.yaml").read_text())
    assert config["seed"] == 1
    assert "overwrite" not in config
    assert "out" not in config


def test_an_interrupted_run_goes_on_to_the_same_end(user: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C exits with 130 and says how to go on; the resumed run ends where an undisturbed one does."""
    user += ["--steps", "100", "--checkpoint_every", "5"]
    assert main([*user, "--out", "whole"]) == 0
    user[user.index("--data") + 1] = user[user.index("--data") + 1].replace(":points", ":Interrupting")
    capsys.readouterr()
    # rows are read for 64 steps at a time
    assert main([*user, "--data_args.after", "1500", "--out", "run"]) == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("l3d: interrupted; last checkpoint: run")
    assert message.endswith("go on with: l3d resume run")
    assert not Path("run", "metrics.json").exists()
    assert main(["resume", "run"]) == 0
    whole, resumed = l3d.load("whole"), l3d.load("run")
    for index in range(whole.n_subnetworks):
        for name, tensor in whole.subnetwork(index).items():
            assert torch.equal(tensor, resumed.subnetwork(index)[name])
    assert read("run")["error"] == read("whole")["error"]


def test_a_run_interrupted_at_once_says_so(user: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Without a checkpoint the message promises none."""
    user[user.index("--data") + 1] = user[user.index("--data") + 1].replace(":points", ":Interrupting")
    assert main([*user, "--data_args.after", "20", "--checkpoint_every", "10", "--out", "run"]) == 130
    assert "before the first checkpoint" in capsys.readouterr().err


def test_report_is_written_again(user: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`l3d report` brings back the same page, without model or data."""
    assert main([*user, "--out", "run"]) == 0
    page = Path("run", "report.html")
    before = page.read_bytes()
    page.unlink()
    next(Path().glob("user_*.py")).unlink()
    assert main(["report", "run"]) == 0
    assert page.read_bytes() == before
    assert "run/report.html" in capsys.readouterr().out


def test_broken_run_folders_are_named(user: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown key and unreadable figures are refused by file, and nothing is overwritten."""
    assert main([*user, "--out", "run"]) == 0
    Path("run", "metrics.json").write_text("{")
    assert "run/metrics.json: not readable as JSON" in refusal(capsys, ["evaluate", "run"])
    assert Path("run", "metrics.json").read_text() == "{"
    with Path("run", "config.yaml").open("a") as file:
        file.write("stepz: 3\n")
    assert "run/config.yaml: Subcommand 'decompose' does not accept option 'stepz'" in refusal(
        capsys, ["evaluate", "run"]
    )


@pytest.mark.data
def test_language_model_from_the_command_line(tmp_path: Path, data_dir: Path) -> None:
    """A real language model is decomposed on a text file, and evaluated on rows kept apart."""
    run = str(tmp_path / "run")
    arguments = ["--model", f"hf:{data_dir / 'stories260k'}", "--data", f"text:{data_dir / 'stories.txt'}"]
    arguments += [
        "--data_args.max_rows",
        "80",
        "--held_out",
        "16",
        "--evaluate_rows",
        "32",
        "--divergence",
        "kl",
    ]
    arguments += [
        "--params",
        "model.layers.2.self_attn.*",
        "--rank",
        "2",
        "--n_subnetworks",
        "10",
        "--steps",
        "5",
    ]
    assert main(["decompose", *arguments, "--batch_size", "8", "--out", run]) == 0
    metrics = read(run)
    assert math.isfinite(metrics["error"])
    assert math.isfinite(metrics["held_out_error"])
    assert metrics["n_rows"] == 32
    assert main(["evaluate", run]) == 0
    assert read(run) == metrics


# --- the recovery suite -----------------------------------------------------------------------------------------


def test_toy_all_writes_the_table_here_and_into_a_readme(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`l3d toy all` runs each experiment for each seed and writes the table, also between a file's two marks."""
    monkeypatch.setattr(suite, "EXPERIMENTS", (suite.Experiment("columns", "tmcs", {"error": ".064"}),))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- toys -->\nold\n<!-- /toys -->\nafter\n", encoding="utf-8")
    command = ["toy", "all", "--seeds", "2", "--seed", "3", "--steps", "20", "--out", str(tmp_path / "all")]
    assert main([*command, "--readme", str(readme)]) == 0
    table = (tmp_path / "all" / "table.md").read_text(encoding="utf-8")
    assert readme.read_text(encoding="utf-8") == f"before\n<!-- toys -->\n{table}<!-- /toys -->\nafter\n"
    assert table in capsys.readouterr().out
    assert "| columns | error | .064 |" in table
    written = json.loads((tmp_path / "all" / "results.json").read_text(encoding="utf-8"))
    assert written["seeds"] == [3, 4]
    assert written["arguments"] == {"steps": 20}
    assert len(written["results"]["columns"]["error"]) == 2
    assert len(set(written["results"]["columns"]["error"])) == 2
    assert refusal(capsys, command) == f"--out: {tmp_path / 'all'} exists and is not an empty folder"


def test_toy_all_looks_for_the_place_of_its_table_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A README without the two lines is refused before anything is run, and stays what it was."""
    readme = tmp_path / "README.md"
    readme.write_text("<!-- toys -->\nno end\n", encoding="utf-8")
    line = refusal(capsys, ["toy", "all", "--out", str(tmp_path / "all"), "--readme", str(readme)])
    assert line == f"{readme}: expected the lines <!-- toys --> and <!-- /toys -->, between which the text goes"
    assert readme.read_text(encoding="utf-8") == "<!-- toys -->\nno end\n"
    assert not (tmp_path / "all").exists()
