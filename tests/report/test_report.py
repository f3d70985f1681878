"""Write reports and plots: the page shows the run folder's contents, works offline and never varies."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import l3d
from l3d.cli.main import main
from l3d.report import report
from l3d.report.report import MAX_DIAGRAMS, plots, write_report

pytest.importorskip("jinja2")
matplotlib = pytest.importorskip("matplotlib")

TMS = {"W_in": (2, 5), "W_out": (5, 2), "b_out": (5,)}


class Page(HTMLParser):
    """What a browser would find in the page: every tag with its attributes, and the text inside."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def diagrams(self) -> list[str]:
        return [at["id"] for at in self.all("figure") if "network" in at.get("class", "").split()]


def make_run(folder: Path, model: nn.Module, n_inputs: int, n_subnetworks: int = 4, steps: int = 3) -> Path:
    """Save a short real decomposition and its metrics."""
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(32, n_inputs, generator=generator)
    settings = {"rank": 1, "k": 0.25, "steps": steps, "batch_size": 16, "warm_start": 1, "seed": 0}
    d = l3d.decompose(model, data, n_subnetworks=n_subnetworks, **settings)
    d.save(folder)
    rates = [round(i / n_subnetworks, 3) for i in range(n_subnetworks)]
    metrics = {
        "error": 0.18743219876543,
        "kept_per_sample": 1.03125,
        "dead_fraction": 1 / n_subnetworks,
        "activation_rate": rates,
        "seconds": 3725.5,
        "steps_per_second": 1612.25,
        "peak_memory_bytes": 431 * 2**20,
        "held_out_error": 0.21,
        "mmcs": 0.9973,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    (folder / "config.yaml").write_text("name: tms\nseed: 0\n", encoding="utf-8")
    return folder


def mlp(*sizes: int) -> nn.Module:
    """Build an MLP with a fixed start."""
    torch.manual_seed(0)
    layers = OrderedDict((f"layer{i}", nn.Linear(*sizes[i : i + 2])) for i in range(len(sizes) - 1))
    return nn.Sequential(layers).eval()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("small"), mlp(5, 2, 5), 5)


@pytest.fixture
def run(small_run, tmp_path):
    return Path(shutil.copytree(small_run, tmp_path / "run"))


def test_page_asks_for_nothing_over_the_network(run):
    """No address of any kind, no resource tag, one script, and a policy that allows just that script."""
    page = Page(write_report(run))
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not {"link", "iframe", "object", "embed", "img", "base"} & {tag for tag, _ in page.tags}
    links = [at[key] for _, at in page.tags for key in ("src", "href", "action", "data") if key in at]
    assert links
    assert all(link.startswith("#") for link in links)
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"}
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [at["content"] for at in page.all("meta") if "http-equiv" in at]
    assert policy.startswith("default-src 'none'")
    assert f"script-src 'sha256-{allowed}';" in policy


def test_every_link_inside_the_page_has_its_target_once(run):
    """Ids are unique over all figures, and each #link, clip path and marker exists."""
    page = Page(write_report(run))
    ids = [at["id"] for _, at in page.tags if "id" in at]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', page.source)) <= set(ids)


def test_markup_in_names_and_settings_stays_text(tmp_path):
    """A parameter's name, a setting or the run's title cannot become part of the page."""
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict([("<script>alert(1)<", nn.Linear(5, 3)), ("b\"'&", nn.Linear(3, 5))])).eval()
    run = make_run(tmp_path / "run", model, 5)
    (run / "config.yaml").write_text("name: '<img src=x onerror=alert(2)>'\n", encoding="utf-8")
    page = Page(write_report(run))
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert "<script>alert(1)<.weight" in page.text
    assert "<img src=x onerror=alert(2)>" in page.text


def test_same_run_folder_gives_the_same_bytes(run, tmp_path, monkeypatch):
    """Neither the time, the place, the user's matplotlib settings nor an older report leave a trace."""
    first = write_report(run).read_bytes()
    copy = shutil.copytree(run, tmp_path / "elsewhere")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    assert write_report(copy).read_bytes() == first
    assert write_report(run).read_bytes() == first
    assert matplotlib.rcParams["axes.facecolor"] == "red"


def test_headline_figures_are_those_of_the_metrics(run):
    """Each figure at the top carries its exact value beside the readable one."""
    metrics = json.loads((run / "metrics.json").read_text())
    page = Page(write_report(run))
    exact = [json.loads(at["value"]) for at in page.all("data")]
    expected = ["error", "held_out_error", "mmcs", "kept_per_sample", "dead_fraction"]
    assert exact == [metrics[key] for key in (*expected, "seconds", "steps_per_second", "peak_memory_bytes")]
    assert {"18.7\u00a0%", "25\u00a0%", "0.997", "1 h 2 min", "1,612", "431 MiB"} <= set(page.text)


def test_without_metrics_the_end_of_training_is_shown(run):
    """A folder that only d.save wrote still gives a page, and the page says so."""
    (run / "metrics.json").unlink()
    (run / "config.yaml").unlink()
    page = Page(write_report(run))
    history = l3d.load(run).history
    exact = [json.loads(at["value"]) for at in page.all("data")]
    assert exact == [history[key][-1] for key in ("error", "kept_per_sample")]  # dead is not known yet
    assert "Figures of the end of training" in page.text
    assert page.text.count("run") >= 1


def test_columns_of_ones_own_stay_in_the_table(run):
    """They are kept beside the run, None is a dash, and one that does not fit is refused before anything is written."""
    mine = torch.tensor([0.5, -2.0, float("nan"), 3.0])
    page = Page(l3d.write_report(run, columns={"mine": mine, "<b>": [1, None, 2, 3]}))
    assert {"mine", "<b>", "-2", "–"} <= set(page.text)
    again = write_report(run).read_bytes()
    assert again == page.source.encode()
    assert json.loads((run / "columns.json").read_text()) == {
        "mine": [0.5, -2.0, None, 3.0],
        "<b>": [1.0, None, 2.0, 3.0],
    }
    with pytest.raises(ValueError, match=r"columns: 'short': expected a number for each of 4 subnetworks, got 1"):
        write_report(run, columns={"short": [1.0]})
    with pytest.raises(ValueError, match=r"columns: expected \{header: list of numbers\} \('words': "):
        write_report(run, columns={"words": ["a", "b", "c", "d"]})
    assert (run / "report.html").read_bytes() == again
    assert "mine" not in Page(write_report(run, columns={})).text


REFUSED = {
    "two dimensions": (
        {"x": torch.ones(4, 1)},
        r"expected \{header: list of numbers\} \('x': expected one dimension, got Tensor \[4, 1\]\)",
    ),
    "numpy's": ({"x": np.ones((4, 2))}, r"expected .* \('x': .* got ndarray \[4, 2\]\)"),
    "no dimension": ({"x": torch.tensor(1.0)}, r"expected .* \('x': .* got Tensor\)"),
    "lists": ({"x": [[1.0]] * 4}, r"expected .* \('x': must be real number, not list\)"),
    "a text": ({"x": "1234"}, r"expected .* \('x': .* got str\)"),
    "too large": ({"x": [10**400] * 4}, r"expected .* \('x': int too large to convert to float\)"),
    "a number": ({"x": 4}, r"expected .* \('x': 'int' object is not iterable\)"),
    "short": ({"x": [1.0]}, r"'x': expected a number for each of 4 subnetworks, got 1"),
    "long": ({"x": [1.0] * 5}, r"'x': expected a number for each of 4 subnetworks, got 5"),
    "its number": ({"#": [1.0] * 4}, r"'#': expected a header that the table does not have"),
    "its impact": ({"impact": [1.0] * 4}, r"'impact': expected a header that the table does not have"),
    "a tensor": ({"layer0.weight": [1.0] * 4}, r"'layer0.weight': expected a header that the table does not have"),
    "empty": ({" ": [1.0] * 4}, r"' ': expected a header that the table does not have"),
}


def test_the_headers_of_the_table_are_known():
    """Those that the template writes are refused for columns of the user's own."""
    template = (Path(report.__file__).parent / "templates" / "report.html.j2").read_text(encoding="utf-8")
    assert tuple(re.findall(r'<th scope="col".*>([^<{]+)</button></th>', template)) == report.HEADERS


@pytest.mark.parametrize("name", REFUSED)
def test_columns_that_cannot_be_shown_are_refused(run, name):
    """The line names the header; where they stand in the run's file it names that too, and how to be rid of it."""
    columns, message = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^columns: {message}$"):
        write_report(run, columns=columns)
    assert not (run / "columns.json").exists()
    if any(isinstance(values, (torch.Tensor, np.ndarray)) for values in columns.values()):
        return
    (run / "columns.json").write_text(json.dumps(columns))
    with pytest.raises(ValueError, match=rf"columns.json: {message}; write_report\(RUN, columns=\{{\}}\) drops them$"):
        write_report(run)
    if name == "short":
        write_report(run, columns={})
        assert json.loads((run / "columns.json").read_text()) == {}


def test_a_column_without_a_number_is_shown_as_unknown(run):
    """None, NaN and infinities are dashes; what can be read once only is kept too."""
    page = Page(write_report(run, columns={"none known": iter([None, float("nan"), float("inf"), -float("inf")])}))
    assert json.loads((run / "columns.json").read_text()) == {"none known": [None] * 4}
    assert [at["data-value"] for at in page.all("td") if at.get("data-value") == "-Infinity"] == ["-Infinity"] * 4


def test_another_decomposition_in_the_folder_has_no_columns_of_the_one_before(run, recwarn):
    """Saved over, with the same K or another, what was known of each subnetwork is deleted, and that is said."""
    write_report(run, columns={"mine": [1, 2, 3, 4]})
    held = {"metrics.json", "columns.json"}

    def there() -> set[str]:
        return {path.name for path in run.iterdir()} & held

    d = l3d.load(run)
    d.save(run)  # the same one
    assert there() == held
    (run / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"has no manifest.json"):
        l3d.load(run).save(run)
    assert there() == held
    model, data = mlp(5, 2, 5), torch.rand(32, 5)
    for other in (
        l3d.decompose(model, data, 4, rank=1, steps=2, callbacks=[]),
        l3d.decompose(model, data, 3, rank=1, steps=2, callbacks=[]),
        l3d.load(run).double(),
    ):
        for name in held:
            (run / name).write_text("{}")
        with pytest.warns(UserWarning, match=r"run: held another decomposition, so its metrics.json, columns.json are"):
            other.save(run)
        assert not there()
    recwarn.clear()
    other.save(run)
    assert not recwarn
    write_report(run, columns={"mine": [1, 2, 3, 4]})
    l3d.decompose(model, data, 3, rank=1, steps=2, callbacks=[], out=run, existing="overwrite")
    assert not (run / "columns.json").exists()


def test_a_run_made_from_python_has_a_report(tmp_path, capsys):
    """From Python and from the command line; commands that need the model say what to call in Python."""
    model, data = mlp(5, 2, 5), torch.rand(32, 5)
    d = l3d.decompose(model, data, 4, rank=1, steps=3, out=tmp_path / "run", callbacks=[])
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "impact" not in Page(tmp_path / "run" / "report.html").text
    rates = d.evaluate(model, data).activation_rate
    described = l3d.describe(d, model, data, activation_rate=rates)
    page = Page(l3d.write_report(tmp_path / "run", described=described))
    assert {"impact", "How often each subnetwork is used"} <= set(page.text)
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "subnetworks.json").is_file()
    capsys.readouterr()
    for command in ("evaluate", "intervene", "resume"):
        assert main([command, str(tmp_path / "run")]) == 2
        refusal = capsys.readouterr().err
        assert "was made from Python, so no config.yaml names its model and data; in Python call l3d.load" in refusal
        assert refusal.count("\n") == 1


def test_figures_that_were_not_finite_are_shown_as_missing(run):
    """metrics.json holds null for them."""
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"error": None}))
    page = Page(write_report(run))
    assert page.all("data")[0]["value"] == "null"


def test_one_diagram_for_each_subnetwork_of_a_small_network(run):
    assert Page(write_report(run)).diagrams() == [f"subnetwork-{i}" for i in range(4)]


def test_no_diagram_of_a_wide_network(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run", mlp(5, plots.MAX_UNITS + 1, 5), 5)))
    assert page.diagrams() == []
    assert page.all("table")


def test_a_thousand_subnetworks_make_a_small_page(tmp_path):
    """Every one has a row; only the most active ones are drawn."""
    path = write_report(make_run(tmp_path / "run", mlp(5, 2, 5), 5, n_subnetworks=1000, steps=2))
    page = Page(path)
    assert len(re.findall(r'<th scope="row">(?:<a [^>]*>)?\d+', page.source)) == 1000
    assert page.diagrams() == [f"subnetwork-{i}" for i in range(1000 - MAX_DIAGRAMS, 1000)]
    assert path.stat().st_size < 3_000_000


def test_shares_of_a_row_are_those_of_the_subnetwork(run):
    """The table's percentages are the tensors' squared norms, which sum to one."""
    page = Page(write_report(run))
    shown = [float(at["style"].removeprefix("--share:")) for at in page.all("td") if at.get("class") == "share"]
    d = l3d.load(run)
    expected = [100 * float(t.square().sum()) for i in range(4) for t in d.subnetwork(i).values()]
    assert shown == pytest.approx(expected, abs=0.051)


def _truncate(run):
    (run / "metrics.json").write_text('{"error": 0.1')


def _wrong_kind(run):
    (run / "metrics.json").write_text("[1, 2]")


def _wrong_length(run):
    (run / "metrics.json").write_text('{"activation_rate": [0.5]}')


def _broken_config(run):
    (run / "config.yaml").write_text("name: [")


def _foreign_description(run):
    (run / "subnetworks.json").write_text('{"format": "other", "subnetworks": []}')


def _description_of_another_run(run):
    (run / "subnetworks.json").write_text('{"format": "l3d-subnetworks-1", "subnetworks": [{}]}')


def _no_decomposition(run):
    for path in run.rglob("*"):
        if path.is_file() and path.name not in ("metrics.json", "config.yaml", "report.html"):
            path.unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (_truncate, r"metrics\.json: not readable as JSON"),
        (_wrong_kind, r"metrics\.json: expected a JSON object, got list"),
        (_wrong_length, r"metrics\.json: activation_rate: expected 4 rates, got 1"),
        (_broken_config, r"config\.yaml: not readable as YAML"),
        (_foreign_description, r"subnetworks\.json: expected format 'l3d-subnetworks-1', got 'other'"),
        (_description_of_another_run, r"subnetworks\.json: expected 4 subnetworks, got 1"),
        (_no_decomposition, "run"),
    ],
)
def test_a_broken_run_folder_is_named_and_the_old_report_stays(run, damage, message):
    before = write_report(run).read_bytes()
    damage(run)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".report*"))


def test_a_missing_run_folder_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such run folder"):
        write_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(run, monkeypatch, missing):
    """One line says what to install, and no report is begun."""
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing}: pip install 'l3d\[report\]'$"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_importing_the_report_imports_no_extra():
    code = "import sys, l3d.report.report, l3d.report.plots; print({'jinja2', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "shapes, biases",
    [
        (TMS, [None, "b_out"]),
        ({"b_out": (5,), "W_in": (2, 5), "W_out": (5, 2)}, [None, "b_out"]),
        ({"a": (5, 5), "a_b": (5,), "b": (5, 5), "b_b": (5,)}, ["a_b", "b_b"]),
        ({"a": (5, 5), "b": (5, 5), "late": (5,)}, [None, "late"]),
        ({"a": (5, 5), "b": (5, 5), "late": (5,), "later": (5,)}, ["later", "late"]),
        ({"only": (3, 4)}, [None]),
    ],
)
def test_chain_is_read_from_the_shapes(shapes, biases):
    """A bias goes to the nearest matrix of its size before it, then to one after it."""
    chain = plots.mlp_chain(shapes)
    assert [layer.weight for layer in chain] == [name for name, shape in shapes.items() if len(shape) == 2]
    assert [layer.bias for layer in chain] == biases
    assert [(layer.n_out, layer.n_in) for layer in chain] == [s for s in shapes.values() if len(s) == 2]


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"bias": (5,)},
        {"a": (2, 5), "b": (5, 3)},  # sizes do not meet
        {"a": (2, 5), "scale": (7,)},  # a vector of no layer
        {"a": (2, 5), "b": (2,), "scale": (2,)},  # two vectors for one layer
        {"a": (2, 5), "conv": (2, 2, 3, 3)},
        {"a": (plots.MAX_UNITS + 1, 5)},
    ],
)
def test_what_is_no_small_chain_is_not_drawn(shapes):
    assert plots.mlp_chain(shapes) is None
    with pytest.raises(ValueError, match="expected a chain"):
        plots.network_diagram([{name: torch.zeros(shape) for name, shape in shapes.items()}], shapes)


def test_an_edge_joins_the_units_of_its_weight():
    """W[out, in] runs from the in-th unit on the left to the out-th on the right, in its sign's colour."""
    network = {name: torch.zeros(shape) for name, shape in TMS.items()}
    network["W_in"][1, 3] = -0.5
    network["W_out"][4, 0] = 1.0
    figure = plots.network_diagram([network], TMS)
    (axes,) = figure.axes
    first, second = (item for item in axes.collections if hasattr(item, "get_segments"))
    unit = [0.9, 0.7, 0.5, 0.3, 0.1]  # five units from top to bottom; two are at 0.75 and 0.25
    assert first.get_segments()[0].ravel().tolist() == pytest.approx([0, unit[3], 1, 0.25])
    assert second.get_segments()[0].ravel().tolist() == pytest.approx([1, 0.75, 2, unit[4]])
    assert len(first.get_segments()) == len(second.get_segments()) == 1
    colours = [matplotlib.colors.to_hex(item.get_colors()[0]) for item in (first, second)]
    assert colours == [plots.NEGATIVE, plots.POSITIVE]
    assert second.get_linewidths()[0] > first.get_linewidths()[0]


def test_many_subnetworks_share_one_figure_and_scale():
    networks = [{name: torch.full(shape, 0.1 * i) for name, shape in TMS.items()} for i in range(7)]
    figure = plots.network_diagram(networks, TMS)
    widths = [axes.collections[0].get_linewidths() for axes in figure.axes[1:7]]
    assert [float(width[0]) for width in widths] == sorted(float(width[0]) for width in widths)


def _history(n_steps: int) -> dict[str, list[float]]:
    error = [float("nan"), float("inf"), *(1 / (1 + i / 50) for i in range(n_steps - 2))]
    k = [1.0 if i < n_steps // 4 else 0.1 for i in range(n_steps)]
    kept = [8 * share for share in k]
    return {
        "step": list(range(n_steps)),
        "error": error,
        "kept_per_sample": kept,
        "dead_fraction": [0.0] * n_steps,
        "k": k,
    }


@pytest.mark.parametrize("n_steps", [4, 5000])
def test_error_curve_is_binned_and_survives_what_is_not_finite(n_steps):
    """Long histories become at most MAX_POINTS points that keep the mean; the warm start is marked."""
    history = _history(n_steps)
    figure = plots.error_curve(history)
    line = figure.axes[0].lines[0]
    assert len(line.get_xdata()) == min(n_steps, plots.MAX_POINTS)
    assert float(line.get_ydata().compressed()[-1]) == pytest.approx(history["error"][-1], rel=0.01)
    assert any("warm start" in text.get_text() for text in figure.axes[0].texts)
    assert "inf" not in plots.to_svg(figure)


def test_error_curve_of_one_step_that_diverged():
    history = {key: values[:1] for key, values in _history(4).items()}
    assert plots.to_svg(plots.error_curve(history)).startswith("<svg")


@pytest.mark.parametrize("n_subnetworks", [1, 10, plots.MAX_BARS + 40])
@pytest.mark.parametrize("n_dead", [0, 1])
def test_activation_rates_count_the_dead(n_subnetworks, n_dead):
    rates = [0.0] * n_dead + [0.1] * (n_subnetworks - n_dead)
    notes = [text.get_text() for text in plots.activation_rates(rates).axes[0].texts]
    assert ("1 dead" in notes) == bool(n_dead)
