"""Open the report in a real browser: it loads alone and without errors, sorts, searches, opens cards, prints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l3d
from l3d.analysis.view import View
from l3d.cli.main import main
from l3d.report.report import write_report
from l3d.storage import run_folder

from browser import Browser
from small_models import Classifier, Tiny

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

TOKENS = [
    " the",
    "<script>document.title='taken'</script>",
    "\n",
    "<b>",
    "&amp;",
    " cat",
    "s",
    ".",
    " sat",
    " on",
    "'\"",
]


def save_run(folder: Path, model: nn.Module, data: Tensor, n: int, view: View | None = None, **settings: Any) -> Path:
    """Make a short real run and everything in its folder; return the page."""
    d = l3d.decompose(model, data, n, rank=1, divergence="kl", k=0.2, steps=3, seed=0, **settings)
    d.save(folder)
    rates = d.evaluate(model, data).activation_rate.tolist()
    rates[0] = 0.0
    run_folder.write_metrics(folder, {"error": 0.5, "activation_rate": rates, "environment": "l3d here"})
    ratios = [None if k == 1 else 1.5 + k for k in range(n)]
    found = l3d.describe(d, model, data, view=view, activation_rate=rates, intervention_ratio=ratios)
    run_folder.write_subnetworks(folder, found)
    return write_report(folder)


@pytest.fixture(scope="module")
def text_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model's report whose tokens hold markup."""
    torch.manual_seed(0)
    view = View(tokens=lambda ids: [TOKENS[i] for i in ids])
    return save_run(tmp_path_factory.mktemp("text"), Tiny().eval(), torch.randint(11, (16, 7)), 20, view)


def opened(browser: Browser, page: Path, fragment: str = "") -> None:
    """Open a page, which must ask for nothing but itself and complain of nothing."""
    browser.look()
    browser.open(page, fragment)
    assert browser.errors == []
    assert browser.requests == [page.resolve().as_uri()]


def column(browser: Browser, header: str) -> list[str]:
    """Return the visible cells below a header."""
    return browser.run(
        f"""(() => {{
          const heads = [...document.querySelectorAll('#subnetworks thead th')].map((th) => th.textContent);
          const at = heads.indexOf({json.dumps(header)});
          return [...document.querySelectorAll('#subnetworks tbody tr')].filter((row) => !row.hidden)
            .map((row) => row.cells[at].textContent.trim());
        }})()"""
    )


def click(browser: Browser, selector: str) -> None:
    browser.run(f"document.querySelector({json.dumps(selector)}).click()")


def cards(browser: Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('.card')].map((card) => card.id)")


def test_a_toy_run_of_the_command_line_opens_sorts_and_shows_its_cards(browser: Browser, tmp_path: Path) -> None:
    """Points as bars, the diagram in the card, figures as in metrics.json and subnetworks.json."""
    run = tmp_path / "run"
    assert main(["toy", "tms", "--steps", "30", "--evaluate_rows", "100", "--out", str(run)]) == 0
    opened(browser, run / "report.html")
    described = json.loads((run / "subnetworks.json").read_text())["subnetworks"]
    assert cards(browser) == [f"card-{i}" for i in range(5)]
    assert browser.run("document.querySelectorAll('.card .bars').length") == sum(len(seen["top"]) for seen in described)
    assert browser.run("document.querySelectorAll('.card .diagram svg').length") == 5
    click(browser, "#subnetworks thead th:nth-child(3) button")  # impact: the largest first
    order = sorted(range(5), key=lambda i: -described[i]["impact"])
    assert column(browser, "#") == [str(i) for i in order]
    assert cards(browser) == [f"card-{i}" for i in order]
    ids = browser.run("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))


def test_markup_in_tokens_stays_text(browser: Browser, text_page: Path) -> None:
    """Nothing that the model's tokens say becomes part of the page."""
    opened(browser, text_page)
    assert "taken" not in browser.run("document.title")
    assert browser.run("document.querySelectorAll('script').length") == 2
    assert browser.run("document.querySelectorAll('.card script, .card b, td b').length") == 0
    shown = browser.run("document.getElementById('cards').innerText")
    assert "<script>document.title='taken'</script>" in shown
    assert "&amp;" in shown
    assert text_page.read_text(encoding="utf-8").count("<script") == 2


def test_the_marked_token_is_the_one_of_largest_impact(browser: Browser, text_page: Path) -> None:
    """Every context has one mark, at its position; the first one's shade is full."""
    opened(browser, text_page)
    seen = json.loads((text_page.parent / "subnetworks.json").read_text())["subnetworks"][0]["top"]
    marks = browser.run("[...document.querySelectorAll('#card-0 mark')].map((mark) => mark.textContent)")
    ids = [top["tokens"][top["position"] - top["first"]] for top in seen]
    assert marks == [TOKENS[i].replace("\n", "↵") for i in ids]
    assert seen[0]["shares"][seen[0]["position"]] == 100 or seen[0]["position"] == 0
    facts = browser.run("document.querySelector('#card-2 .facts').innerText")
    assert "intervention ratio" in facts
    assert "3.50" in facts
    assert "intervention ratio" not in browser.run("document.querySelector('#card-1 .facts').innerText")
    assert column(browser, "ratio")[:3] == ["1.5", "–", "3.5"]


def test_the_keyboard_alone_searches_opens_a_card_and_shows_more(browser: Browser, text_page: Path) -> None:
    opened(browser, text_page)
    assert len(cards(browser)) == 12
    browser.run("document.getElementById('filter').focus()")
    browser.write("17")
    assert column(browser, "#") == ["17"]
    assert cards(browser) == ["card-17"]
    while browser.run("document.activeElement.hash ?? ''") != "#card-17":
        before = browser.run("document.activeElement.outerHTML")
        browser.press("Tab", 9)
        assert browser.run("document.activeElement.outerHTML") != before
    browser.press("Enter", 13, "\r")
    browser.until("document.getElementById('card-17').classList.contains('open')")  # by the event of a new hash
    assert browser.run("document.activeElement.id") == "card-17"
    browser.run("(() => { const f = document.getElementById('filter'); f.value = ''; f.focus(); })()")
    browser.write("dead")
    assert column(browser, "kept for, %") == ["dead"] * len(column(browser, "#"))
    browser.run("document.getElementById('filter').select()")
    browser.write("sat")  # what the cards say can be found
    found = column(browser, "#")
    described = json.loads((text_page.parent / "subnetworks.json").read_text())["subnetworks"]
    holding = {
        str(k)
        for k, seen in enumerate(described)
        if 8
        in {i for top in seen["top"] for i in top["tokens"]}
        | {i for side in ("raised", "lowered") for i, _ in seen[side]}
    }
    assert set(found) == holding


def test_texts_that_are_one_sample_each_have_no_mark(browser: Browser, tmp_path: Path) -> None:
    """A classifier of texts: no token is marked, and classes move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(42, 3)).eval()
    view = View(tokens=lambda ids: [TOKENS[i] for i in ids], classes=["bad", "so-so", "good"])
    opened(browser, save_run(tmp_path, model, torch.randint(11, (16, 7)), 4, view))
    assert browser.run("document.querySelectorAll('.card .context').length") > 0
    assert browser.run("document.querySelectorAll('.card mark').length") == 0
    named = browser.run("[...document.querySelectorAll('.card .moves .token')].map((each) => each.textContent)")
    assert set(named) <= {"bad", "so-so", "good"}
    assert named


def test_a_link_to_a_card_opens_it(browser: Browser, text_page: Path) -> None:
    opened(browser, text_page, "#card-19")
    assert cards(browser) == ["card-19"]  # from there on, in the table's order
    assert browser.run("document.activeElement.id") == "card-19"


def test_dark_and_printed(browser: Browser, text_page: Path) -> None:
    """Dark paper is dark, printed paper is white and without controls, and a narrow page does not scroll sideways."""
    opened(browser, text_page)
    paper = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    assert min(browser.run(paper)) > 240
    browser.look(dark=True)
    assert max(browser.run(paper)) < 40
    browser.look(dark=True, printed=True)
    assert browser.run(paper) == [255, 255, 255]
    visible = "[...document.querySelectorAll('.search, .more-cards')].filter((e) => e.offsetParent).length"
    assert browser.run(visible) == 0
    assert browser.run("document.querySelector('.card').offsetParent !== null")
    browser.look(width=400)
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.run(visible) == 2


def test_images_are_shown_from_within_the_page(browser: Browser, tmp_path: Path) -> None:
    """The policy allows them, and they are there."""
    torch.manual_seed(0)
    view = View(classes=["cat", "dog", "frog", "ship"])
    page = save_run(tmp_path, Classifier().eval(), torch.randn(12, 3, 6, 6), 4, view, params="conv.*")
    opened(browser, page)
    widths = browser.run("Promise.all([...document.images].map((i) => i.decode().then(() => i.naturalWidth)))")
    assert widths == [6] * 24
    raised = column(browser, "raises")
    assert len(raised) == 4
    assert all(set(words.split()) <= {"cat", "dog", "frog", "ship"} for words in raised)


def test_a_thousand_subnetworks_are_drawn_only_as_far_as_they_are_looked_at(browser: Browser, tmp_path: Path) -> None:
    torch.manual_seed(0)
    page = save_run(tmp_path, Tiny().eval(), torch.randint(11, (8, 7)), 1000, batch_size=8)
    opened(browser, page)
    assert len(column(browser, "#")) == 1000
    assert len(cards(browser)) == 12
    click(browser, "#more-cards")
    assert len(cards(browser)) == 24
    browser.run("location.hash = '#card-999'")
    assert browser.run("new Promise((done) => setTimeout(() => done(document.activeElement.id)))") == "card-999"
    assert browser.run("document.querySelectorAll('#cards *').length") < 20_000
    assert browser.errors == []
    assert page.stat().st_size < 6_000_000


@pytest.mark.data
def test_a_real_language_models_run(browser: Browser, data_dir: Path, tmp_path: Path) -> None:
    """As the README runs it, but for a few steps."""
    model, run = f"hf:{data_dir / 'stories260k'}", tmp_path / "run"
    source = ["--model", model, "--data", f"text:{data_dir / 'stories.txt'}", "--params", "model.layers.2.self_attn.*"]
    size = ["--n_subnetworks", "8", "--rank", "2", "--steps", "3", "--evaluate_rows", "16", "--describe", "32"]
    assert main(["decompose", *source, "--divergence", "kl", *size, "--out", str(run)]) == 0
    opened(browser, run / "report.html")
    assert len(cards(browser)) == 8
    assert "stories260k" in browser.run("document.querySelector('h1').textContent")
    assert browser.run("document.querySelectorAll('.context mark').length") == 48
