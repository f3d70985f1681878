"""Parse the command line: --help lists every option, --print_config can be read back, errors are one line."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import l3d
import l3d.toys
from l3d.cli.main import main
from l3d.cli.parser import COMMANDS

from command_line import refusal


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command's --help explains all its options and ends with an example of itself."""
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for option in (option for group in COMMANDS[command].groups.values() for option in group):
        assert (option.values if option.positional else f"--{option.name}") in text
        assert option.help.split()[0] in text
    assert "--config FILE" in text
    assert "--print_config" in text
    assert "%" not in text
    assert f"  l3d {command} " in text[text.index("example") :]


def test_help_is_quick() -> None:
    """Neither --help nor a mistake on the command line waits for torch or transformers to be imported."""
    root = Path(__file__).resolve().parents[2]
    program = f"""
import sys, types
package = types.ModuleType("l3d")  # without what the package itself imports
package.__path__ = [{str(root / "l3d")!r}]
sys.modules["l3d"] = package
from l3d.cli.main import main
print(main(["toy", "--help"]), main(["toy", "tms", "--steps", "x"]))
print(sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-2:] == ["0 2", "[]"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "expected one of toy, decompose, evaluate, resume, sweep, intervene, paper, report"),
        (["fly"], "invalid choice: 'fly'"),
        (["toy"], "NAME is required"),
        (["toy", "tms", "--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["toy", "nothing"], "expected one of tms"),
        (["toy", "tms", "--steps", "many"], "--steps: expected a whole number above 0, got many"),
        (["toy", "tms", "--k", "0"], "--k: expected a number above 0, got 0"),
        (
            ["toy", "tms", "--divergence", "l2"],
            "--divergence: expected mse|kl|mse_published|python:MODULE:FUNCTION, got l2",
        ),
        (["toy", "tms", "--rank", "{a: 0}"], "--rank: expected R|auto|{GLOB:R}|{GLOB:[R,R]}, got {'a': 0}"),
        (["toy", "tms", "--config", "nothing.yaml"], "--config: File does not exist"),
        (["toy", "--config", "unknown.yaml"], "does not accept option 'stepz'"),
        (["toy", "--config", "broken.yaml"], "Problems parsing config"),
        (["decompose", "--data", "npz:a.npz"], "--model SPEC is required"),
        (["decompose", "--model", "python:user:model"], "--data SPEC is required"),
        (
            ["decompose", "--model", "a", "--data", "b"],
            "expected one of hf:DIR_OR_ID, python:pkg.module:factory",
        ),
        (["evaluate", "nothing"], "nothing: no such run folder"),
        (["resume", "."], "not a run folder of l3d"),
        (["report", "."], "not a run folder of l3d"),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every mistake on the command line ends with status 2 and one line that names it; nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.yaml").write_text("name: tms\nstepz: 3\n")
    (tmp_path / "broken.yaml").write_text("name: [\n")
    assert message in refusal(capsys, arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.yaml", "unknown.yaml"]


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """With L3D_DEBUG=1 the error itself is raised."""
    monkeypatch.setenv("L3D_DEBUG", "1")
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        main(["evaluate", "nothing"])


def test_printed_configuration_is_accepted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--print_config prints what --config reads, slices, globs and lists included, to the same result."""
    given = ["--rank", '{"*.q.*": [1, 2], "b": 3}', "--data_args.rows", "10:20", "--data_args.length=24"]
    given += ["--data_args.std", "[.1,.2]", "--params", "[a.*,b]", "--lr", "1e-3", "--positions", "4"]
    assert main(["decompose", *given, "--print_config"]) == 0
    first = capsys.readouterr().out
    config = yaml.safe_load(first)
    assert config["rank"] == {"*.q.*": [1, 2], "b": 3}
    assert config["data_args"] == {"rows": "10:20", "length": 24, "std": [0.1, 0.2]}
    assert config["params"] == ["a.*", "b"]
    assert (config["lr"], config["positions"]) == (1e-3, 4)
    (tmp_path / "c.yaml").write_text(first)
    assert main(["decompose", "--config", str(tmp_path / "c.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("rows", ["-200:", ":5", "1:30", ":"])
def test_slices_are_not_read_as_numbers(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A slice stays a string, though YAML takes 1:30 for 90 and -200: for a mapping."""
    assert main(["decompose", f"--data_args.rows={rows}", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data_args"] == {"rows": rows}


def test_module_entry_point(tmp_path: Path) -> None:
    """`python -m l3d` is the same command line, with its status and without a traceback."""
    command = [sys.executable, "-m", "l3d"]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    settings: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, "toy", "tms", "--steps", "20", "--out", "run"], **settings, check=False)
    assert done.returncode == 0, done.stderr
    assert math.isfinite(json.loads((tmp_path / "run" / "metrics.json").read_text())["mmcs"])
    failed = subprocess.run([*command, "toy", "nothing"], **settings, check=False)
    assert failed.returncode == 2
    assert failed.stderr.splitlines() == [
        f"l3d: error: toy: expected one of {', '.join(l3d.toys.NAMES)}, got 'nothing'"
    ]


def test_only_a_process_of_its_own_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line sets the allocator up; whoever calls `main` with arguments keeps theirs as it was."""
    called: list[bool] = []
    monkeypatch.setattr("l3d.training.memory.keep_freed_memory", lambda: called.append(True))
    assert main(["evaluate", "no/such/run"]) == 2
    assert called == []
    monkeypatch.setattr(sys, "argv", ["l3d", "evaluate", "no/such/run"])
    assert main() == 2
    assert called == [True]
