"""Mistakes on the command line and in configuration files are one line; output fits into every encoding."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from l3d.cli.main import main
from l3d.cli.parser import COMMANDS
from l3d.storage.yaml_text import load_yaml

from command_line import refusal


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- configuration files ------------------------------------------------------------------------------------------

BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CONFIGS = [
    (b"", "expected lines such as 'steps: 500', got nothing"),
    (b"  \n\n", "got nothing"),
    (b"# steps: 3\n", "got nothing"),
    (b"null\n", "got nothing"),
    (b"\xff\xfen\x00a\x00", "expected text in UTF-8 (invalid start byte at byte 0)"),
    (b"name: tms\nparams: caf\xe9\n", "expected text in UTF-8"),
    ("name: tms\nparams: é\n".encode("utf-16"), "expected text in UTF-8"),
    (b"\x80\x81\x82", "expected text in UTF-8"),
    (b"- name\n- tms\n", "got a list"),
    (b"[]\n", "got a list"),
    (b"tms\n", "got a text"),
    (b"'name: tms'\n", "got a text"),
    (b"3\n", "got 3"),
    (b"name: tms\n3: 4\n", "got the name 3"),
    (b"name: tms\nsteps: 3\nsteps: 4\n", "line 3: 'steps' is given twice"),
    (b"name: tms\nk: 0.1\nseed: 1\nk: 0.1\n", "line 4: 'k' is given twice"),
    (b"name: tms\nrank: {'*': 1, '*': 2}\n", "line 2: '*' is given twice"),
    (b"name: tms\ngradients:\n  shuffle: true\n  shuffle: false\n", "line 4: 'shuffle' is given twice"),
    (b"name: tms\nsteps: 010\n", "line 2: 010: write 10, or '010' with quotes for a text"),
    (b"name: tms\nseed: -007\n", "line 2: -007: write 7"),
    (b"name: tms\nrank: {'*': 02}\n", "line 2: 02: write 2"),
    (b"name: tms\nparams: [a, 00]\n", "line 2: 00: write 0"),
    (b"name: tms\n\tsteps: 3\n", "line 2: "),
    (b"\tname: tms\n", "line 1: "),
    (b"name: tms\nrank:\n\t'*': 2\n", "line 3: "),
    (b"name: [\n", "line 2: "),
    (b"name: tms\nsteps: *x\n", "line 2: found undefined alias 'x'"),
    (b"name: tms\nrank: &a {b: *a}\n", "line 2: *a contains itself"),
    (b"name: tms\n---\nname: tms\n", "line 2: expected a single document"),
    (b"name: !!python/object/apply:os.getcwd []\n", "line 1: could not determine a constructor"),
    (b"name: tms\x00\n", "Problems parsing config"),
    (b"[" * 5000, "nested too deeply"),
    (BOMB.encode(), "more than 100000 values"),
]


@pytest.mark.parametrize("content, said", CONFIGS, ids=range(len(CONFIGS)))
def test_a_configuration_that_is_none(content: bytes, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty, in another encoding, with a key twice, octal numbers, tabs: one line with the file, the line, the cure."""
    Path("my.yaml").write_bytes(content)
    line = refusal(capsys, ["toy", "--config", "my.yaml", "--print_config"])
    assert line.startswith("my.yaml: ")
    assert said in line


def test_a_run_whose_configuration_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """The same of config.yaml in a run folder."""
    Path("run").mkdir()
    for content in ("name: tms\nsteps: 3\nsteps: 4\n", "name: tms\nsteps: 010\n", "name: tms\nrank: {'*': 02}\n"):
        Path("run/config.yaml").write_text(content)
        for command in ("evaluate", "resume", "intervene"):
            assert "run/config.yaml: Problems parsing config: line " in refusal(capsys, [command, "run"])


def test_no_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for given in ("", "missing.yaml", "folder", "tms"):
        assert refusal(capsys, ["toy", "--config", given]).startswith("--config: ")


def test_a_configuration_in_utf8(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read alike with a byte order mark, with Windows' line ends, and where the machine's own encoding is another."""
    text = "name: tms\nparams: ['é.*', ‖]\nlr: 1e-3\n"
    for content in (text, "\ufeff" + text, text.replace("\n", "\r\n"), text.replace("\n", "  \n")):
        Path("my.yaml").write_bytes(content.encode())
        assert main(["toy", "--config", "my.yaml", "--print_config"]) == 0
        read = yaml.safe_load(capsys.readouterr().out)
        assert read["params"] == ["é.*", "‖"]
        assert read["lr"] == 0.001


# each text with what Python's own reading of it is; YAML 1.1 has 8, 90, 5410, a date and a text for some of them
VALUES: dict[str, Any] = {
    **{text: int(text) for text in ("0", "7", "-5", "+3", "1000", "1_000")},
    **{text: float(text) for text in ("0.5", ".5", "5.", "1e-3", "1E5", "-2.5e+3", "1_0.5", "010.5", "0e0")},
    **{text: int(text, 16) for text in ("0x10", "-0xfF")},
    ".inf": math.inf,
    "-.inf": -math.inf,
    **{text: text for text in ("1:30", "10:20", "1:30:10", "190:20:30.15", "08:15", "2024-01-01", "0o17", "0b11")},
    **{text: text for text in ("1e", "e5", "inf", ".", "1.2.3", "abc")},
    **{text: text[1:-1] for text in ("'010'", '"1e-3"', "'1:30'", "'null'")},
    "true": True,
    "null": None,
    "[1e-3, .5, 3]": [0.001, 0.5, 3],
    "{a: 1:30, b: {c: 1e-3}}": {"a": "1:30", "b": {"c": 0.001}},
    "{a: &x {b: 1}, c: *x}": {"a": {"b": 1}, "c": {"b": 1}},
    "{<<: {a: 1, b: 2}, b: 3}": {"a": 1, "b": 3},
}


@pytest.mark.parametrize("text", VALUES)
def test_values_are_what_they_look_like(text: str) -> None:
    read = load_yaml(text)
    assert (read, type(read)) == (VALUES[text], type(VALUES[text]))
    assert load_yaml(f"key: {text}") == {"key": VALUES[text]}


# --- options ------------------------------------------------------------------------------------------------------

TOY = ["toy", "tms", "--steps", "5"]
OPTIONS = [
    *((["--device", device], "--device: ") for device in ("gpu", "cuda:99", "cuda:x", "3.5", "", "meta", "-1")),
    *((["--out", out], "--out: ") for out in ("", "file/run", "file/run/deeper", "x" * 300)),
    *((["--seed", seed], "--seed: expected a whole number") for seed in ("1.5", "true", "1:30", "x", "1e3")),
    *((["--steps", steps], "--steps: expected a whole number above 0") for steps in ("0", "-1", "2.5", "true", "1:30")),
    *((["--batch_size", size], "--batch_size: expected a whole number above 0") for size in ("0", "-8", "x", "[8]")),
    *((["--k", k], "k: expected a ") for k in ("0", "-1", "nan", "true", "x", "1.5", "inf")),
    *((["--rank", rank], "rank: ") for rank in ("0", "true", "2.0", "Auto", "99", "{'*': 0}", "{x*: 2}", "[2]")),
    *((["--rank", rank], "--rank: ") for rank in ("{a: 1, a: 2}", "{a: 010}")),
    *((["--preset", preset], "--preset: expected default|published") for preset in ("best", "1", "", "Default")),
    *((["--divergence", name], "--divergence: expected mse|kl") for name in ("l2", "MSE", "", "python:x")),
]


@pytest.mark.parametrize("arguments, said", OPTIONS, ids=[" ".join(arguments)[:40] for arguments, _ in OPTIONS])
def test_a_value_that_cannot_work(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line names the option, before a run folder is made."""
    Path("file").write_text("mine")
    assert said in refusal(capsys, [*TOY, *arguments])
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_an_integer_is_never_octal(capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line, where no YAML is meant, 010 is ten."""
    for option in ("--steps", "--seed", "--batch_size", "--n_subnetworks"):
        assert main(["toy", "tms", option, "010", "--print_config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)[option[2:]] == 10


@pytest.mark.parametrize("out", ["", "file/run"])
def test_no_folder_to_write_into(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that writes refuses it, rather than take another folder."""
    Path("file").write_text("mine")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("name: tms\n")
    user = ["--model", "python:user:model", "--data", "python:user:data"]
    commands: list[list[str]] = [["toy", "all"], ["decompose", *user], ["paper", "tms"], ["resume", "run"]]
    commands += [["sweep", "--toy", "tms", "--over.k", "[.1]"], ["evaluate", "run"], ["report", "run"]]
    for command in [*commands, ["intervene", "run"]]:
        assert refusal(capsys, [*command, "--out", out]).startswith("--out: ")


# --- sweeps -------------------------------------------------------------------------------------------------------

SWEEPS = [
    (["--over.rank", "[1,99]"], "over.rank: 99 exceeds "),
    (["--over.rank", "[1,auto,7]"], "over.rank: 7 exceeds "),
    (["--over.rank", "[0]"], "over.rank: expected a positive whole number, got 0"),
    (["--over.rank", "[1,2.0]"], "over.rank: expected a positive whole number, got 2.0"),
    (["--over.rank", "[many]"], "over.rank: expected a positive whole number, got 'many'"),
    (["--over.k", "[.1,1.5]"], "over.k: expected a fraction in (0, 1], got 1.5"),
    (["--over.k", "[.1,0]"], "over.k: expected a fraction in (0, 1], got 0"),
    (["--over.k", "[.1,true]"], "over.k: expected a fraction in (0, 1], got True"),
    (["--over.n_subnetworks", "[5,0]"], "over.n_subnetworks: expected a positive whole number, got 0"),
    (["--over.n_subnetworks", "[5,-1]"], "over.n_subnetworks: expected a positive whole number, got -1"),
    (["--over.n_subnetworks", "[5,2.5]"], "over.n_subnetworks: expected a positive whole number, got 2.5"),
    (["--over.seed", "[0,1.5]"], "over.seed: expected a whole number, got 1.5"),
    (["--over.seed", "[0,true]"], "over.seed: expected a whole number, got True"),
    (["--over.seed", "[0,one]"], "over.seed: expected a whole number, got 'one'"),
    (["--over.steps", "[5]"], "over: expected lists for some of"),
    (["--over.k", "[.1]", "--rank", "99"], "rank: 99 exceeds "),
    (["--over.k", "[.1]", "--params", "nothing"], "params: no parameter matches 'nothing'"),
    (["--over.rank", "[1]", "--k", "2"], "k: expected a fraction in (0, 1], got 2"),
    (["--over.k", "[.1]", "--batch_size", "0"], "--batch_size: expected a whole number above 0, got 0"),
    (["--over.k", "[.1]", "--preset", "best"], "--preset: expected default|published, got best"),
    (["--over.k", "[.1]", "--divergence", "l2"], "--divergence: expected mse|"),
    (["--over.k", "[.1]", "--warm_start", "6"], "warm_start: expected a number of steps in [0, 5], got 6"),
    (["--over.k", "[.1]", "--lr", "inf"], "lr: expected a positive number, got inf"),
    (["--over.k", "[.1]", "--device", "gpu"], "--device: gpu cannot be used"),
]


@pytest.mark.parametrize("arguments, said", SWEEPS, ids=[" ".join(arguments) for arguments, _ in SWEEPS])
def test_a_sweep_that_cannot_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every combination is checked before the first run, which would have worked, and before anything is written."""
    monkeypatch.setattr("l3d.decompose", lambda *_, **__: pytest.fail("a run has started"))
    assert said in refusal(capsys, ["sweep", "--toy", "tms", "--steps", "5", *arguments])
    assert list(Path().iterdir()) == []


# --- encodings ----------------------------------------------------------------------------------------------------

ENCODINGS = [
    {"PYTHONIOENCODING": "cp1252"},
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp437:strict"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]
PROGRAM = f"""
import sys
from l3d.cli.main import main
helps = [[name, "--help"] for name in {list(COMMANDS)}]
for arguments in [[], *helps, ["toy", "tms", "--steps", "20", "--out", "run"]]:
    sys.argv = ["l3d", *arguments]
    status = main()
    assert status == (0 if arguments else 2), (arguments, status)
sys.argv = ["l3d", "toy", "--config", "my.yaml", "--print_config"]
assert main() == 0
"""


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: " ".join(encoding.values()))
def test_output_in_another_encoding(encoding: dict[str, str], folder: Path) -> None:
    """Each command's help and a run's figures on a stdout that lacks ‖ and ²: status 0, and no less is written."""
    Path("my.yaml").write_text("name: tms\nparams: [é‖]\n", encoding="utf-8")
    root = str(Path(__file__).resolve().parents[2])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | {"PYTHONPATH": root} | encoding, capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stderr.decode("ascii", "replace")
    assert b"The error reported is sum ?g - ?" in ended.stdout
    assert b"metrics: run" in ended.stdout
    assert {"config.yaml", "metrics.json", "decomposition.json"} <= {path.name for path in Path("run").iterdir()}
