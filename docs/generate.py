"""Write the site's generated pages: the reference of every public name and command, and the notebooks.

MkDocs runs this file as a hook (`hooks:` in mkdocs.yml). It adds pages to the build and writes nothing into docs/.
Python entries are `::: name` lines, which mkdocstrings fills from the docstrings without importing the code. Pages of
commands walk the parser of `l3d.cli.parser`, so they list exactly the options that the command line takes.
"""

import argparse
import base64
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from inspect import getdoc, ismodule
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "docs" / "notebooks"
sys.path.insert(0, str(ROOT))


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the files of the site (an event of MkDocs)."""
    from mkdocs.structure.files import File

    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    return files


def pages() -> dict[str, str | bytes]:
    """Return every generated page, by its path in the site's sources."""
    written: dict[str, str | bytes] = {}
    for package in ("l3d", "l3d_kernels"):
        module = import_module(package)
        written[f"reference/{package}.md"] = python_page(module)
        for name in module.__all__:
            if ismodule(getattr(module, name)):
                written[f"reference/{package}.{name}.md"] = python_page(getattr(module, name))
    written["reference/commands.md"] = command_page()
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        written |= notebook_pages(notebook)
    return written


class InnerProducts(griffe.Extension):
    """Keep inner products in docstrings from being read as tags of HTML (an extension of Griffe's)."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = inner_products(obj.docstring.value)


# --- Python -------------------------------------------------------------------------------------------------------


def public_names(module: ModuleType) -> list[str]:
    """Return a module's `__all__`, or else the classes and functions that it defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__, key=str.lower)
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted((name for name in own if not name.startswith("_")), key=str.lower)


def first_sentence(item: Any) -> str:
    """Return the first line of an object's docstring, for a table."""
    text = inner_products((getdoc(item) or "").split("\n\n")[0]).replace("\n", " ").replace("|", r"\|")
    return text if callable(item) or ismodule(item) else ""


def inner_products(text: str) -> str:
    """Write <a, b> as ⟨a, b⟩, which Markdown does not take for a tag.

    >>> inner_products("|<Vin_k, g_s>| < 1")
    '|⟨Vin_k, g_s⟩| < 1'
    """
    return re.sub(r"<([^<>\n]{1,40}, ?[^<>\n]{1,40})>", r"⟨\1⟩", text)


def python_page(module: ModuleType) -> str:
    """Write a module's page: a table of its public names, then an entry for each."""
    rows, entries = [], []
    for name in public_names(module):
        item, path = getattr(module, name), f"{module.__name__}.{name}"
        target = f"{path}.md" if ismodule(item) else f"#{path}"
        rows.append(f"| [`{name}`]({target}) | {first_sentence(item)} |")
        if not ismodule(item):
            entries.append(f"::: {path}\n    options:\n      heading: {path}\n      toc_label: {name}\n")
    table = "\n".join(["| name | what it does |", "|---|---|", *rows])
    summary = (getdoc(module) or "").split("\n\n")[0]
    return f"# {module.__name__}\n\n{summary}\n\n{table}\n\n" + "\n".join(entries)


# --- the command line ---------------------------------------------------------------------------------------------


def subparsers() -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """Return the command line's commands: name -> (summary, parser)."""
    from l3d.cli.parser import _parser

    action = next(each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction))
    summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {name: (summaries.get(name, ""), parser) for name, parser in action.choices.items()}


def cell(text: str) -> str:
    """Write a text so that Markdown shows it as it is, inside a table's cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|*_\[\]`\\])", r"\\\1", text)


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """Yield a parser's groups that show an option: (title, options)."""
    for group in parser._action_groups:
        shown = [each for each in group._group_actions if each.help != argparse.SUPPRESS]
        if shown:
            yield group.title or "", shown


def option_row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Write an option's row: how it is spelt, what it takes, what it does."""
    names = sorted(action.option_strings, key=len, reverse=True)[:1] or [action.dest.upper()]
    metavar = action.metavar if action.nargs != 0 and action.option_strings else None
    values = " ".join(metavar) if isinstance(metavar, tuple) else metavar or ""
    values = re.sub(r"[\x00-\x1f]", "", values)  # jsonargparse hides a backspace in one
    gap = "" if not values or values.startswith("[=") else " "
    spelt = f"`{names[0]}{gap}{values}`".replace("|", r"\|")
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return f"| {spelt} | {cell(text)} |"


def command_page() -> str:
    """Write the page of all commands, with every option."""
    parts = ["# Command line\n", "`l3d COMMAND`, or `python -m l3d COMMAND`. Every command takes `--help`.\n"]
    commands = subparsers()
    parts.append("| command | what it does |\n|---|---|")
    parts += [f"| [`l3d {name}`](#l3d-{name}) | {cell(summary)} |" for name, (summary, _) in commands.items()]
    for name, (_, parser) in commands.items():
        parts.append(f"\n## l3d {name}\n\n{cell(parser.description or '')}\n")
        parts.append(f"```text\n{parser.format_usage().removeprefix('usage: ').strip()}\n```\n")
        for title, actions in options(parser):
            parts.append(f"| {cell(title)} | |\n|---|---|")
            parts += [option_row(parser, action) for action in actions]
            parts.append("")
        examples = (parser.epilog or "").partition("\n")[2]
        if examples:
            lines = "\n".join(line.removeprefix("  ") for line in examples.splitlines())
            parts.append(f"```sh\n{lines}\n```\n")
    return "\n".join(parts) + "\n"


# --- notebooks ----------------------------------------------------------------------------------------------------


def notebook_pages(path: Path) -> dict[str, str | bytes]:
    """Write a notebook as a page, with the outputs that are stored in it, and its pictures as files."""
    name = f"notebooks/{path.stem}"
    parts: list[str] = []
    written: dict[str, str | bytes] = {}
    for cell_ in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell_["source"])
        if cell_["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell_["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                picture = f"{name}-{len(written)}.png"
                written[picture] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{text or 'a plot'}]({Path(picture).name})")
            elif text:
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.append(f"[Download this notebook]({path.name})")
    return written | {f"{name}.md": "\n\n".join(parts) + "\n"}
