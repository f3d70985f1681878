"""Read YAML without surprises: what looks like one thing and is another is refused in one line."""

from pathlib import Path
from typing import Any

import pytest

from l3d.cli.parser import parse
from l3d.storage.run_folder import read_command
from l3d.storage.yaml_text import read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)

SURPRISES: dict[str, tuple[str | bytes, str]] = {
    "a name twice": ("a: 1\nb: 2\na: 3\n", "line 3: 'a' is given twice"),
    "a name twice within": ("a: {b: 1, b: 2}\n", "line 1: 'b' is given twice"),
    "a name twice in a list": ("a:\n- b: 1\n  b: 1\n", "line 3: 'b' is given twice"),
    "a name twice by an alias": ("&x a: 1\n*x : 2\n", "'a' is given twice"),
    "octal": ("steps: 010\n", "line 1: 010 is another number in YAML"),
    "octal with a sign": ("steps: -017\n", "-017 is another number"),
    "octal in a list": ("rank: [1, 07]\n", "07 is another number"),
    "to the base of 60": ("rows: 1:30\n", "1:30 is another number"),
    "to the base of 60, with a point": ("rows: 1:30.5\n", "1:30.5 is another number"),
    "infinity": ("lr: .inf\n", "expected a finite number, got .inf"),
    "no number": ("lr: [.nan]\n", "expected a finite number, got .nan"),
    "too large": ("lr: 1e999\n", "expected a finite number, got 1e999"),
    "a number of 5,000 digits": (f"steps: {'1' * 5000}\n", "finite number|limit"),
    "a name that is true": ("on: 1\n", "expected a name, got 'on'; put it in quotes"),
    "a name that is a number": ("rank: {1: 2}\n", "expected a name, got '1'; put it in quotes"),
    "a list for a name": ("? [a]\n: 1\n", "expected a name"),
    "a tag that runs": ("a: !!python/object/apply:os.getcwd []\n", "python/object/apply:os.getcwd' is not read"),
    "a tag of bytes": ("a: !!binary aGk=\n", "'binary' is not read"),
    "a set": ("a: !!set {b, c}\n", "'set' is not read"),
    "merged names": ("a: &a {b: 1}\nc: {<<: *a}\n", "expected a name, got '<<'"),
    "a bomb": (BOMB, "more than 100,000 values"),
    "a value within itself": ("a: &a [*a]\n", "more than 100,000 values, or something within itself"),
    "names within themselves": ("a: &a {b: *a}\n", "more than 100,000 values, or something within itself"),
    "deep": ("a: " + "[" * 100_000, "maximum nesting depth|nested more than 50 times"),
    "rather deep": ("a: " + "[" * 200 + "]" * 200, "nested more than 50 times"),
    "empty": ("", "the file is empty"),
    "spaces only": (" \n\n", "the file is empty"),
    "not UTF-8": (b"a: \xff\xfe\n", "can't decode"),
    "UTF-16": ("a: 1\n".encode("utf-16"), "can't decode"),
    "a control character": (b"a: \x00\n", "special characters are not allowed|control characters"),
    "not YAML": ("a: [1\n", "expected"),
    "two documents": ("a: 1\n---\nb: 2\n", "single document"),
    "large": ("a: 1\n" * 300_000, "larger than 1,048,576 bytes"),
}


@pytest.mark.parametrize("content, message", SURPRISES.values(), ids=SURPRISES)
def test_what_would_surprise_is_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    """One line with the file's name, from the reader, the run folder and the command line alike."""
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (
        read_yaml,
        lambda path: read_command(path.parent),
        lambda path: parse(["toy", "tms", "--config", str(path)]),
    ):
        with pytest.raises(ValueError, match=rf"config\.yaml: not readable as YAML \(.*({message})") as refusal:
            read(path)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "text, value",
    [
        ("a: 1e-3\nb: 10\nc: 0\nd: -0.5\n", {"a": 1e-3, "b": 10, "c": 0, "d": -0.5}),
        ("a: 2024-01-01\nb: '010'\nc: 0x1f\nd: 1_000\n", {"a": "2024-01-01", "b": "010", "c": 31, "d": 1000}),
        ("a: &a [1, 2]\nb: *a\n", {"a": [1, 2], "b": [1, 2]}),  # as a writer puts a list that is there twice
        ("'on': yes\n'1': ~\nrows: '1:30'\n", {"on": True, "1": None, "rows": "1:30"}),
        ("# nothing but a comment\n", None),
        ("a: {'*.q.*': [1, 2], h.0: 3}\n", {"a": {"*.q.*": [1, 2], "h.0": 3}}),
    ],
)
def test_plain_yaml_is_read(text: str, value: Any, tmp_path: Path) -> None:
    """Numbers, texts in quotes, dates as texts, and an alias of a list."""
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == value


@pytest.mark.parametrize("value", ["{a: 010}", "{a: 1, a: 2}", "&a {b: *a}", "{1: 2}"])
def test_values_on_the_command_line_are_read_alike(value: str) -> None:
    """What a file may not say, an option may not either."""
    with pytest.raises(Exception, match="rank"):
        parse(["toy", "tms", "--rank", value])
