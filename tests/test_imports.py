"""Import the packages without optional libraries, environment changes or a GPU; check who imports whom."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import l3d
import l3d_kernels

ROOT = Path(l3d_kernels.__file__).resolve().parents[1]
FILES = {package: sorted((ROOT / package).rglob("*.py")) for package in ("l3d", "l3d_kernels")}
# the modules of l3d by their dotted names; a package's __init__ is the package, and __main__ is a program
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in FILES["l3d"]
    if path.stem != "__main__" and path.relative_to(ROOT).parts != ("l3d", "__init__.py")
]


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh interpreter in the repository's root; warnings are errors."""
    command = [sys.executable, "-W", "error:::l3d", "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def imported_roots(tree: ast.AST) -> set[str]:
    """Return the first names of every module a file imports, at the top or inside functions."""
    roots: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            roots.add((node.module or "").partition(".")[0])
    return roots


QUIET = """
import os, sys
before = dict(os.environ)
for name in {blocked!r}:
    sys.modules[name] = None
import {package}
for name in {package}.__all__:
    getattr({package}, name)
assert dict(os.environ) == before, "the environment was changed"
found = sorted(set({unwanted!r}) & {{name.partition(".")[0] for name in sys.modules if sys.modules[name]}})
assert not found, f"imported {{found}}"
import torch
assert not torch.cuda.is_initialized(), "CUDA was started"
"""


@pytest.mark.parametrize(
    "package, blocked, unwanted",
    [
        ("l3d_kernels", ["triton"], ["l3d", "transformers", "matplotlib", "jinja2", "rich"]),
        ("l3d_kernels", [], ["l3d"]),
        ("l3d", [], ["transformers", "matplotlib", "jinja2", "datasets", "huggingface_hub", "jsonargparse", "yaml"]),
        ("l3d", ["triton", "transformers", "matplotlib", "jinja2", "yaml", "jsonargparse"], []),
    ],
)
def test_import_is_quiet(package: str, blocked: list[str], unwanted: list[str]) -> None:
    """Every public name can be had without the optional libraries; nothing is printed, set or started."""
    finished = run(QUIET.format(package=package, blocked=blocked, unwanted=unwanted))
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_the_kernels_work_without_triton() -> None:
    """Without triton every operation still runs on the CPU, and asking for triton says what is missing."""
    program = """
import sys
sys.modules["triton"] = None
import torch, l3d_kernels as lk
left, right = torch.ones(2, 1, 3), torch.ones(2, 1, 4)
assert lk.gram(left, right).tolist() == [[12, 12], [12, 12]]
try:
    lk.gram(left, right, backend="triton")
except RuntimeError as error:
    assert "backend='triton'" in str(error), error
else:
    raise AssertionError("not refused")
"""
    finished = run(program)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_kernels_refuse_a_cpu_tensor_without_the_interpreter() -> None:
    """Where Triton's interpreter is off, backend="triton" names the tensor's device and what would help."""
    program = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch, l3d_kernels as lk
try:
    lk.gram(torch.ones(2, 1, 3), torch.ones(2, 1, 4), backend="triton")
except RuntimeError as error:
    assert "gram got a CPU tensor; move it to a GPU, or set TRITON_INTERPRET=1" in str(error), error
else:
    raise AssertionError("not refused")
"""
    finished = run(program)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.parametrize("path", FILES["l3d_kernels"], ids=lambda path: path.name)
def test_the_kernels_never_import_the_package_above(path: Path) -> None:
    """No file of l3d_kernels imports l3d, relative imports included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert "l3d" not in imported_roots(tree)
    reaching_up = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level > 1]
    assert not reaching_up


def test_plain_torch_does_not_import_triton() -> None:
    """The definitions, the CPU path and all that they import of the package do without triton."""
    for path in FILES["l3d_kernels"]:
        if "kernels" not in path.relative_to(ROOT).parts[1:-1]:
            roots = imported_roots(ast.parse(path.read_text(encoding="utf-8")))
            known = {"typing", "collections", "importlib", "numpy", "torch", "l3d_kernels", "jaxtyping", "__future__"}
            known.add("weakref")
            assert roots <= known, path
    program = """
import sys
sys.modules["triton"] = sys.modules["jaxtyping"] = None
from l3d_kernels import cpu, reference
assert not [name for name in sys.modules if name.startswith("l3d_kernels.kernels")]
"""
    finished = run(program)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.parametrize("package", [l3d, l3d_kernels], ids=lambda package: package.__name__)
def test_every_public_name_exists(package: object) -> None:
    """`__all__` holds no name twice and none that is missing; an unknown name is an AttributeError."""
    names = package.__all__
    assert len(set(names)) == len(names)
    assert all(getattr(package, name) is not None for name in names)
    assert set(names) <= set(dir(package))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


ALONE = """
import importlib, sys
import torch
sys.dont_write_bytecode, sys.pycache_prefix = False, {compiled!r}  # each file is compiled once, not once a module
for name in {names!r}:
    for loaded in [n for n in sys.modules if n.partition(".")[0] == "l3d"]:
        del sys.modules[loaded]
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise AssertionError(name) from error
    assert module.__doc__, f"{{name}} has no docstring"
"""


def test_every_file_can_be_imported_first(tmp_path: Path) -> None:
    """No module of l3d needs another to have been imported before it: imports are not circular."""
    assert {"l3d.train", "l3d.toys", "l3d.toys.cache"} <= set(MODULES)
    finished = run(ALONE.format(names=MODULES, compiled=str(tmp_path)))
    assert (finished.returncode, finished.stderr) == (0, "")


def test_only_the_top_rooms_import_the_root() -> None:
    """`import l3d` and `from l3d import name` stand in cli, studies and report alone: lower rooms name the file."""
    names = set(l3d.__all__) | {"__version__"}
    for path in FILES["l3d"]:
        if path.relative_to(ROOT / "l3d").parts[0] in ("cli", "studies", "report", "__init__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert "l3d" not in {alias.name for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom) and node.module == "l3d":
                assert not names & {alias.name for alias in node.names}, path


def test_no_submodule_hides_a_public_function() -> None:
    """Importing every submodule leaves every public name what it was: no file has a function's name."""
    before = {name: getattr(l3d, name) for name in l3d.__all__}
    for name in MODULES:
        importlib.import_module(name)
    assert {name: getattr(l3d, name) for name in l3d.__all__} == before
    assert not {name.removeprefix("l3d.") for name in MODULES} & (set(l3d.__all__) - {"callbacks", "toys"})


def test_no_test_file_imports_another() -> None:
    """What test files share is in tests/support: no file of tests/ imports a module that is named test_*."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    roots = {path.relative_to(ROOT): imported_roots(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    found = {str(path): sorted(name for name in names if name.startswith("test_")) for path, names in roots.items()}
    assert {path: names for path, names in found.items() if names} == {}
