"""Check the site: its size, its links, its reference of every public name and option, its notebooks."""

import dataclasses
import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import l3d
import l3d_kernels

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
HAND_WRITTEN = [path for path in sorted(DOCS.rglob("*.md")) if path.parent.name != "lab"]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The script that writes the generated pages."""
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_tables_of_benches(text: str) -> str:
    """Leave out what a bench wrote between its marks."""
    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.S)


def test_sizes() -> None:
    """The README stays short, and all that is written by hand can be read in an hour."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    assert len(readme.split()) <= 1500
    pages = [*HAND_WRITTEN, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    words = sum(len(without_tables_of_benches(path.read_text(encoding="utf-8")).split()) for path in pages)
    assert words <= 13_000


def test_links_of_the_readme_lead_somewhere() -> None:
    """MkDocs checks the site's links; these are outside of it."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), target


def test_paths_in_the_pages_exist() -> None:
    """A file of the repository that a page names is there."""
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]:
        for path in re.findall(r"`((?:l3d|l3d_kernels|bench|tests|docs)/[\w/.-]*)`", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


# --- the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [l3d, l3d_kernels], ids=["l3d", "l3d_kernels"])
def test_every_public_name_has_an_entry(package: ModuleType, generate: ModuleType) -> None:
    """Each name in __all__ stands in the table and has an entry; modules have a page with their own names."""
    pages = generate.pages()
    shown = pages[f"reference/{package.__name__}.md"]
    for name in package.__all__:
        item, path = getattr(package, name), f"{package.__name__}.{name}"
        assert f"| [`{name}`](" in shown
        if not inspect.ismodule(item):
            assert f"\n::: {path}\n" in shown
            continue
        own = pages[f"reference/{path}.md"]
        for each in getattr(item, "__all__", ()):
            assert f"\n::: {path}.{each}\n" in own


PUBLIC = [(package, name) for package in (l3d, l3d_kernels) for name in package.__all__]


@pytest.mark.parametrize("package, name", PUBLIC, ids=[f"{package.__name__}.{name}" for package, name in PUBLIC])
def test_every_public_name_is_documented(package: ModuleType, name: str, generate: ModuleType) -> None:
    """A docstring says what a name is; a function's also says which errors it raises, and the shapes of its tensors."""
    item, path = getattr(package, name), f"{package.__name__}.{name}"
    assert generate.first_sentence(path)
    if not inspect.isfunction(item):
        return
    text = f"{inspect.getdoc(item)} {generate.for_all(package)}"
    assert re.search(r"[Rr]aises|refuse|(see|as in) `", text), "no error is named"
    returned = str(inspect.signature(item).return_annotation)
    if "Tensor" in returned or "Gradients" in returned:
        assert re.search(r"\[[^\]]*([A-Z]|\.\.\.)|\[Tensor, ", text + returned), "no shape is named"


def test_fields_and_examples_are_shown(generate: ModuleType) -> None:
    """A result's fields have their comments as texts, and an example is code, so that Markdown eats none of it."""
    import griffe

    extensions = griffe.load_extensions(generate.Docstrings())
    package: Any = griffe.load("l3d", search_paths=[ROOT], extensions=extensions, resolve_aliases=True)
    for name in ("Evaluation", "TopSamples", "TopLogits", "FineTuned", "InterventionRatios"):
        fields = getattr(getattr(l3d, name), "_fields", None) or [
            each.name for each in dataclasses.fields(l3d.FineTuned)
        ]
        missing = [each for each in fields if package[name][each].docstring is None]
        assert not missing, name
    assert package["Evaluation"]["n_samples"].docstring.value.startswith("samples in the data")
    for attribute in ("settings", "history", "threshold", "ranks"):
        assert f"\n    {attribute}: " in package["Decomposition"].docstring.value
    example = package["extract_gradients"].docstring.value
    assert example.endswith("{'weight': [4, 2, 3], 'bias': [4, 2]}\n```\n")
    assert "```pycon\n>>> model" in example


def test_every_command_and_option_is_listed(generate: ModuleType) -> None:
    """Each option of each command's parser has a row under that command, with its help."""
    sections = dict(re.findall(r"^## l3d (\w+)\n(.*?)(?=^## |\Z)", generate.command_page(), re.S | re.M))
    commands = generate.subparsers()
    assert set(sections) == set(commands)
    for name, (summary, parser) in commands.items():
        assert summary
        for _, actions in generate.options(parser):
            for action in actions:
                spelt = generate.long_name(action)
                row = re.search(rf"^\| `{re.escape(spelt)}[ `\[].*\| (.+) \|$", sections[name], re.M)
                assert row is not None, f"l3d {name}: {spelt}"


def test_fences_are_shown_without_the_words_for_tests(generate: ModuleType) -> None:
    """Markdown takes a fence with two words for text, so the second is left out of the page."""
    shown = generate.on_page_markdown("```sh no-run\nmake\n```\n\n    ```python data\n    a\n    ```\n")
    assert shown == "```sh\nmake\n```\n\n    ```python\n    a\n    ```\n"


# --- notebooks ----------------------------------------------------------------------------------------------------


def numbers_left_out(outputs: list[Any]) -> list[str]:
    """Return the printed texts of a cell without their figures, which differ by machine."""
    texts = ("".join(each.get("text", "")) for each in outputs if each.get("name") != "stderr")
    return [re.sub(r"[\d.,% ]+", " ", text) for text in texts if text]


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.data] if path.stem == "language_model" else []) for path in NOTEBOOKS],
    ids=[path.stem for path in NOTEBOOKS],
)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Every cell runs, of the language model with fewer steps; the toy prints what the page shows, but for figures."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if path.stem == "language_model":
        monkeypatch.setenv("L3D_DATA", str(request.getfixturevalue("data_dir")))
    notebook = nbformat.read(path, as_version=4)
    shown = [numbers_left_out(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    assert any(shown)
    if path.stem == "language_model":
        for cell in notebook.cells:
            cell.source = cell.source.replace("steps=200", "steps=40")
    place = {"metadata": {"path": ROOT}}
    client.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    if path.stem == "toy":
        assert shown == [numbers_left_out(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


def test_notebooks_are_stored_without_paths() -> None:
    """Neither a warning of this machine nor a folder of it is in the committed outputs."""
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not any(each.get("name") == "stderr" for each in cell.get("outputs", ()))
            assert "/root" not in json.dumps(cell)
            assert "/home" not in json.dumps(cell)
