"""Skip tests that need real data, a GPU or a browser where there is none; count the skips at the end."""

import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import l3d

from browser import Browser, find_chromium

# as in a test file, a failing assert of theirs then shows the values it compared
pytest.register_assert_rewrite("extraction", "helpers", "layer_checks", "tools", "training_runs")

NO_DATA = "data absent"
NO_GPU = "no GPU"
NO_BROWSER = "no browser"

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads
os.environ.setdefault("MPLBACKEND", "Agg")
# toys that a test run trains stay in the checkout, not in the user's cache
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background job would ignore Ctrl-C, and the tests of it
os.environ.setdefault("L3D_CACHE", str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "l3d"))
if not torch.cuda.is_available():
    # Triton's interpreter runs the kernels on the CPU. Triton reads this when a kernel's module is imported,
    # so it is set before any test file is.
    os.environ.setdefault("TRITON_INTERPRET", "1")
collect_ignore = ["support/ptx_worker.py"]  # a program of its own, which switches the interpreter off
if "OMP_NUM_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def patch_the_language_once_a_launch() -> None:
    """Spare Triton's interpreter work that it repeats, a third of the kernel tests' time.

    At a launch it replaces the language's functions by its own. It does so again at every call of a device function,
    and finds them replaced; here it does so once a launch for each file with functions.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # ids of the global names of the files met in this launch

    def patch_once(function: Any) -> Any:
        names = id(function.__globals__)
        if names in patched:
            return None  # the result is used by a launch alone, whose own function comes first
        patched.add(names)
        return patch(function)

    def launch_anew(*arguments: Any, **options: Any) -> Any:
        patched.clear()
        return launch(*arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    patch_the_language_once_a_launch()


def data_folder() -> Path:
    """Return the folder of real models and data, which may not exist."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("L3D_DATA") or default)


def has_data() -> bool:
    return data_folder().is_dir() and any(data_folder().iterdir())


def data_reason() -> str:
    return f"{NO_DATA}: {data_folder()} is missing or empty; set L3D_DATA"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and data; skips the test where it is absent."""
    if not has_data():
        pytest.skip(data_reason())
    return data_folder()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    data, gpu = has_data(), torch.cuda.is_available()
    for item in items:
        if not data and item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=data_reason()))
        if not gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"{NO_GPU}: torch.cuda.is_available() is False"))


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of later garbage collections, of which each takes half a second."""
    gc.collect()
    gc.freeze()


def pytest_report_header() -> str:
    data = f"{data_folder()}{'' if has_data() else ' (absent)'}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"l3d: torch {torch.__version__}, {torch.get_num_threads()} threads, GPU {gpu}, data {data}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = {NO_DATA: 0, NO_GPU: 0, NO_BROWSER: 0, "other": 0}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        counts[next((kind for kind in (NO_DATA, NO_GPU, NO_BROWSER) if reason.startswith(kind)), "other")] += 1
    terminalreporter.write_line("skips: " + ", ".join(f"{n} {kind}" for kind, n in counts.items()))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; skips the test where there is none."""
    executable = find_chromium()
    if executable is None:
        pytest.skip(f"{NO_BROWSER}: chromium is not installed; apt-get install chromium, or set CHROMIUM")
    with Browser(executable, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(autouse=True)
def _forget_written_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that a test writes is not the next test's of the same name."""
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(written):
            del sys.modules[name]


@pytest.fixture
def float64() -> Iterator[None]:
    """Make every model and input float64, and seed them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def toy() -> tuple["l3d.toys.Toy", "l3d.Decomposition"]:
    """The toy model of superposition with its decomposition, trained once for all tests that only look at them."""
    made = l3d.toys.make("tms")
    return made, l3d.decompose(made.model, made.data, **made.settings | {"n_restarts": 2}, callbacks=[])
