"""Run every command: a run folder suffices to look at a run, to repeat it and to resume it."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import l3d
from l3d.cli import job
from l3d.cli.main import main
from l3d.studies import recovery_suite as suite

from command_line import refusal

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


def named_model():
    import l3d

    layers = model()
    layers.view = l3d.View(classes=["dark", "light"])
    return layers


def far(output, reference):
    return (output - reference).abs().sum(-1)


def alone(output):
    return output.sum(-1)


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
    """A relative --cache.folder is written to config.yaml as an absolute path, so a run resumed elsewhere finds it."""
    assert main([*user, "--cache.folder", "store", "--out", "run"]) == 0
    cache = yaml.safe_load(Path("run/config.yaml").read_text())["cache"]["folder"]
    assert Path(cache).is_absolute()
    assert (Path(cache), Path(cache).is_dir()) == ((tmp_path / "store").resolve(), True)


def test_a_runs_configuration_repeats_it(tmp_path: Path) -> None:
    """config.yaml gives the same figures again, and what stands after it on the command line overrides it."""
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    assert main(["toy", "tms", "--steps", "40", "--k", ".2", "--seed", "1", "--out", first]) == 0
    config = yaml.safe_load(Path(first, "config.yaml").read_text())
    assert (config["name"], config["steps"], config["k"], config["seed"], config["rank"]) == (
        "tms",
        40,
        0.2,
        1,
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


def test_a_divergence_of_the_users_own(user: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It is named as a model is, and loaded again by every command; one of other arguments is refused in a line."""
    module = next(Path().glob("user_*.py")).stem
    own = [*user, "--divergence", f"python:{module}:far", "--k", ".5"]
    assert main([*own, "--dry_run"]) == 0
    assert "one backward call per sample" not in capsys.readouterr().out
    assert main([*own, "--held_out", "20", "--checkpoint_every", "10", "--out", "run"]) == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["divergence"] == f"python:{module}:far"
    assert l3d.load("run").settings["divergence"] == "callable"
    assert "no descriptions" not in capsys.readouterr().err
    before = read("run")
    assert main(["evaluate", "run"]) == 0
    assert read("run")["error"] == before["error"]
    assert main(["intervene", "run", "--rows", "40", "--samples", "8", "--control", "run"]) == 0
    assert main(["resume", "run"]) == 0
    assert read("run")["held_out_error"] == before["held_out_error"]
    capsys.readouterr()
    line = refusal(capsys, [*user, "--divergence", f"python:{module}:alone", "--out", "other"])
    assert line == "divergence: expected a function of (output, reference): too many positional arguments"
    assert "has no 'missing'" in refusal(capsys, [*user, "--divergence", f"python:{module}:missing", "--out", "other"])
    assert not Path("other").exists()


def test_a_run_of_random_weights_is_no_control(user: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """It is to be measured alone; a control of the same random weights is one."""
    few = ["--rows", "40", "--samples", "8"]
    for name, given in {"run": [], "random": ["--random_weights"], "shuffled": ["--random_weights"]}.items():
        shuffled = ["--gradients.shuffle"] if name == "shuffled" else []
        assert main([*user, *given, *shuffled, "--k", ".5", "--describe", "0", "--out", name]) == 0
    capsys.readouterr()
    line = refusal(capsys, ["intervene", "run", *few, "--control", "random"])
    why = "--control: random decomposed random weights, which are not those of run"
    assert line == f"{why}; measure it alone: l3d intervene random"
    assert not Path("run/interventions.json").exists()
    assert main(["intervene", "random", *few, "--control", "shuffled"]) == 0
    assert main(["intervene", "run", *few, "--control", "random", "--any_weights"]) == 0


@pytest.mark.parametrize("held_out", ["0", "20"])
def test_names_come_from_the_models_own_view(user: list[str], held_out: str) -> None:
    """An attribute `view` of a model that is made in Python names the outputs, as for a report from Python."""
    named = [each.replace(":model", ":named_model") for each in user]
    assert main([*named, "--divergence", "kl", "--held_out", held_out, "--out", "run"]) == 0
    found = json.loads(Path("run/subnetworks.json").read_text())
    assert set(found["classes"].values()) == {"dark", "light"}


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
        job.find_run({"run": "run", "out": "copy"})
    monkeypatch.setenv("RANK", "1")
    assert job.find_run({"run": "run", "out": "copy"}) == (Path("run"), Path("copy"))


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
    assert message.endswith("resume with: l3d resume run")
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


# --- what a run folder holds, after other commands ----------------------------------------------------------------


def test_other_data_are_read_as_the_runs_and_said_to_be_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mean and deviation come along, the rows do not; the page and the card name what the error is of."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(f"{name}.npz", images=generator.integers(0, 255, (24, 4, 4, 3), dtype=np.uint8))
    Path("pictures.py").write_text(
        "import torch\n"
        "def model():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))\n"
    )
    how = ["--data_args.mean", "[.5,.4,.3]", "--data_args.std", "[.2,.2,.2]", "--data_args.max_rows", "20"]
    run = ["decompose", "--model", "python:pictures:model", "--data", "npz:a.npz", *how, "--rank", "1", "--steps", "5"]
    assert main([*run, "--out", "run"]) == 0
    assert "error on the training data" in Path("run/README.md").read_text()
    capsys.readouterr()
    assert main(["evaluate", "run", "--data", "npz:b.npz"]) == 0
    assert "--data_args as in the run: mean, std" in capsys.readouterr().err
    inherited = read("run")
    assert inherited["n_rows"] == 24
    assert "error on other data" in Path("run/README.md").read_text()
    assert "error on the training data" not in Path("run/README.md").read_text()
    assert "error on other data" in Path("run/report.html").read_text(encoding="utf-8")
    assert main(["evaluate", "run", "--data", "npz:b.npz", "--data_args", json.dumps({"mean": [0.5, 0.4, 0.3]})]) == 0
    assert read("run")["error"] != inherited["error"]
    assert main(["evaluate", "run"]) == 0
    assert "error on the training data" in Path("run/README.md").read_text()


def test_files_among_arguments_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model's weights in a file beside it; what is no file stays as it was written."""
    monkeypatch.chdir(tmp_path)
    Path("weighed.py").write_text(
        "import torch\n"
        "def model(weights, kind):\n"
        "    layer = torch.nn.Linear(4, 3)\n    layer.load_state_dict(torch.load(weights))\n    return layer\n"
        "def points():\n    return torch.randn(40, 4, generator=torch.Generator().manual_seed(0))\n"
    )
    torch.save(torch.nn.Linear(4, 3).state_dict(), "layer.pt")
    Path("wide").mkdir()
    sources = ["--model", "python:weighed:model", "--data", "python:weighed:points", "--model_args.kind", "wide"]
    run = ["--rank", "1", "--steps", "3", "--describe", "0", "--out", "run"]
    assert main(["decompose", *sources, "--model_args.weights", "layer.pt", *run]) == 0
    chosen = yaml.safe_load(Path("run/config.yaml").read_text())["model_args"]
    assert chosen == {"kind": "wide", "weights": str(tmp_path / "layer.pt")}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["evaluate", "../run", "--describe", "0"]) == 0, capsys.readouterr().err


def test_a_refused_resumption_leaves_no_copy(user: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A run that has others' settings by now is not gone on with, and the copy to go on in is not left behind."""
    assert main([*user, "--out", "run"]) == 0
    path = Path("run/config.yaml")
    path.write_text(path.read_text().replace("n_subnetworks: 6", "n_subnetworks: 5"))
    assert "n_subnetworks differ from" in refusal(capsys, ["resume", "run", "--out", "copy"])
    assert not Path("copy").exists()
    assert main(["resume", "run"]) == 2
    assert Path("run/checkpoints").is_dir()


def test_rates_on_the_cards_are_those_of_the_table(user: list[str]) -> None:
    """Where the descriptions stay what they were, because none are asked for."""
    assert main([*user, "--out", "run"]) == 0
    assert main(["evaluate", "run", "--evaluate_rows", "20", "--describe", "0"]) == 0
    described = json.loads(Path("run/subnetworks.json").read_text())
    assert [seen["activation_rate"] for seen in described["subnetworks"]] == read("run")["activation_rate"]
    assert described["subnetworks"][0]["top"]


@pytest.mark.parametrize("option", ["held_out", "evaluate_rows"])
def test_a_single_row_to_score_is_refused_before_training(
    option: str, user: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, [*user, f"--{option}", "1", "--out", "run"])
    assert line == f"--{option}: expected at least 2 rows: one alone has no other to refer to"
    assert not Path("run").exists()


def test_other_weights_are_refused_by_interventions_unless_asked_for(
    user: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As by `l3d evaluate`, which the refusal names the option of."""
    assert main([*user, "--k", ".5", "--describe", "0", "--out", "run"]) == 0
    module = next(Path().glob("user_*.py"))
    module.write_text(module.read_text().replace("manual_seed(0)", "manual_seed(9)", 1))
    sys.modules.pop(module.stem)
    measure = ["intervene", "run", "--rows", "60", "--samples", "8"]
    assert "that were decomposed; pass --any_weights to use them anyway" in refusal(capsys, measure)
    assert main([*measure, "--any_weights"]) == 0


def test_measured_ratios_stand_in_the_report(user: list[str]) -> None:
    """`l3d intervene` writes them, and draws the page again with a column for them."""
    assert main([*user, "--k", ".5", "--out", "run"]) == 0
    assert '"intervention_ratio"' not in Path("run/report.html").read_text(encoding="utf-8")
    assert main(["intervene", "run", "--rows", "60", "--samples", "8"]) == 0
    found = json.loads(Path("run/interventions.json").read_text())
    page = Path("run/report.html").read_text(encoding="utf-8")
    assert page.count('"intervention_ratio":') == len(found["subnetworks"])
    assert f'"intervention_ratio":{found["ratio"][0]}' in page
    Path("run/interventions.json").write_text('{"subnetworks": [0]}')
    assert main(["report", "run"]) == 2


def test_a_toy_without_one_of_its_matrices_is_decomposed_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only how well circuits were found cannot be told, and that is said."""
    run = tmp_path / "run"
    assert main(["toy", "tms", "--params", "W_in.weight", "--steps", "5", "--n_restarts", "1", "--out", str(run)]) == 0
    assert "recovery cannot be measured without 'W_out.weight'" in capsys.readouterr().err
    assert "mmcs" not in read(str(run))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("config.yaml", {"model": None}, "model: expected a text, got None"),
        ("config.yaml", {"data": None}, "data: expected a text, got None"),
        ("metrics.json", {"error": "low"}, "error: expected a number, got 'low'"),
        ("metrics.json", {"activation_rate": 5}, "activation_rate: expected a list of numbers, got 5"),
        ("metrics.json", {"activation_rate": [None] * 6}, "activation_rate: expected a list of numbers"),
    ],
)
def test_a_file_edited_by_hand_is_named(
    name: str, change: dict[str, Any], message: str, user: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*user, "--out", "run"]) == 0
    path = Path("run", name)
    path.write_text(json.dumps(yaml.safe_load(path.read_text()) | change))  # which is YAML too
    command = "evaluate" if name == "config.yaml" else "report"
    assert refusal(capsys, [command, "run"]) == f"run/{name}: {message}"


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
    assert (
        refusal(capsys, command)
        == f"--out: {tmp_path / 'all'} exists and is not an empty folder; choose another, or pass --overwrite"
    )
    assert main([*command[:3], "1", *command[4:], "--overwrite"]) == 0
    assert json.loads((tmp_path / "all" / "results.json").read_text(encoding="utf-8"))["seeds"] == [3]


def test_toy_all_keeps_the_seeds_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after may fail, or be interrupted."""
    monkeypatch.setattr(suite, "EXPERIMENTS", (suite.Experiment("columns", "tmcs"),))
    original = suite.make

    def make(name: str, seed: int) -> Any:
        if seed == 1:
            raise KeyboardInterrupt
        return original(name, seed)

    monkeypatch.setattr(suite, "make", make)
    assert main(["toy", "all", "--seeds", "2", "--steps", "20", "--out", str(tmp_path / "all")]) == 130
    written = json.loads((tmp_path / "all" / "results.json").read_text(encoding="utf-8"))
    assert written["seeds"] == [0]
    assert len(written["results"]["columns"]["error"]) == 1


@pytest.mark.parametrize("option", [["--log", "tensorboard"], ["--describe", "0"], ["--evaluate_rows", "5"]])
def test_toy_all_refuses_what_it_would_not_do(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, ["toy", "all", *option, "--out", str(tmp_path / "all")])
    assert line == f"{option[0]}: for one toy, not for l3d toy all"
    (tmp_path / "mine.txt").write_text("mine")
    line = refusal(capsys, ["toy", "all", "--overwrite", "--out", str(tmp_path)])
    assert line == f"--out: {tmp_path} holds no results of l3d toy all, so --overwrite will not touch it"


def test_toy_all_looks_for_the_place_of_its_table_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A README without the two lines is refused before anything is run, and stays what it was."""
    readme = tmp_path / "README.md"
    readme.write_text("<!-- toys -->\nno end\n", encoding="utf-8")
    line = refusal(capsys, ["toy", "all", "--out", str(tmp_path / "all"), "--readme", str(readme)])
    assert line == f"{readme}: expected the marker lines <!-- toys --> and <!-- /toys --> around the text to replace"
    assert readme.read_text(encoding="utf-8") == "<!-- toys -->\nno end\n"
    assert not (tmp_path / "all").exists()
