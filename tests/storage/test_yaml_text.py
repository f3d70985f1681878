"""Read a run's config.yaml without surprises; tests/cli/test_messages.py has the same of the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from l3d.cli.parser import read_settings
from l3d.report.report import _read_config
from l3d.storage.run_folder import read_command
from l3d.storage.yaml_text import MOST_BYTES, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
MERGED = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)

SURPRISES: dict[str, tuple[str | bytes, str]] = {
    "a name twice": ("name: tms\nb: 2\nname: tms\n", "line 3: 'name' is given twice"),
    "a name twice within": ("name: tms\nrank: {b: 1, b: 2}\n", "line 2: 'b' is given twice"),
    "a name twice in a list": ("name:\n- b: 1\n  b: 1\n", "line 3: 'b' is given twice"),
    "octal": ("name: tms\nsteps: 010\n", "line 2: 010: write 10"),
    "octal in a list": ("name: [1, 07]\n", "line 1: 07: write 7"),
    "a number of 5,000 digits": (f"name: tms\nsteps: {'1' * 5000}\n", "digits"),
    "a whole number beyond float64": (f"name: tms\nlr: {'1' * 400}\n", "line 2: a number of too many digits"),
    "one of base 16": (f"name: tms\nlr: -0x{'f' * 300}\n", "line 2: a number of too many digits"),
    "a tag that runs": ("name: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    "bytes": ("name: !!binary aGk=\n", "'binary' is not read; write it as a plain value"),
    "a set": ("name: !!set {b, c}\n", "'set' is not read"),
    "ordered pairs": ("name: !!omap [b: 1]\n", "'omap' is not read"),
    "a moment": ("name: !!timestamp 2024-01-01\n", "'timestamp' is not read"),
    "a bomb": (BOMB, "more than 100000 values"),
    "a bomb of merged names": (MERGED, "more than 100000 values"),
    "a value within itself": ("name: &a [*a]\n", "contains itself"),
    "deep": ("name: " + "[" * 100_000, "nested too deeply"),
    "not UTF-8": (b"name: \xff\xfe\n", "can't decode"),
    "UTF-16": ("name: 1\n".encode("utf-16"), "can't decode"),
    "a control character": (b"name: \x00\n", "special characters are not allowed|unacceptable character"),
    "not YAML": ("name: [1\n", "expected"),
    "two documents": ("name: 1\n---\nb: 2\n", "expected a single document"),
    "large": ("name: 1\n" + "#" * MOST_BYTES, "larger than 1,048,576 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(
    "read",
    [read_yaml, lambda path: read_command(path.parent), _read_config, lambda path: read_settings("toy", path.parent)],
    ids=["file", "command", "report", "settings"],
)
@pytest.mark.parametrize("content, message", SURPRISES.values(), ids=SURPRISES)
def test_what_would_surprise_is_refused(
    content: str | bytes, message: str, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    """One line with the file's name, whoever reads it."""
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"config\.yaml: .*({message}|UTF-8)") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text, value",
    [
        ("a: 1e-3\nb: 10\nc: 0\nd: -0.5\n", {"a": 1e-3, "b": 10, "c": 0, "d": -0.5}),
        ("a: 2024-01-01\nb: '010'\nc: 0x1f\nd: 1_000\n", {"a": "2024-01-01", "b": "010", "c": 31, "d": 1000}),
        ("a: &a [1, 2]\nb: *a\n", {"a": [1, 2], "b": [1, 2]}),  # as a writer puts a list that is there twice
        ("rows: 1:30\nat: 10:20:30\n", {"rows": "1:30", "at": "10:20:30"}),
        ("", None),
        ("# nothing but a comment\n", None),
        ("\ufeffa: {'*.q.*': [1, 2], h.0: 3}\n", {"a": {"*.q.*": [1, 2], "h.0": 3}}),
    ],
)
def test_plain_yaml_is_read(text: str, value: Any, tmp_path: Path) -> None:
    """Numbers, texts in quotes, dates and times as texts, and an alias of a list."""
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == value
