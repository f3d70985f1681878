"""Compare the numbers in the paper's figures with their definitions; one command makes all figures."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import l3d
from l3d.api import Decomposition
from l3d.cli.main import main
from l3d.studies.paper import NAMES, measure, studies

FIGURES = {
    "tms": ["subnetworks", "directions", "sweeps", "pairs"],
    "tmcs": ["subnetworks", "directions", "matrix", "sweeps", "pairs"],
    "high_rank": ["subnetworks", "groups", "sweeps", "error-rank"],
    "squared": ["subnetworks", "sweeps", "hidden", "pairs", "error-k"],
}


def test_a_sweep_measures_the_samples_that_hold_the_feature(toy: tuple[Any, Decomposition]) -> None:
    """Root mean square changes by hand; zero where nothing is moved; the subnetwork's own samples move most."""
    made, d = toy
    owner = measure.owners(made, d)
    assert sorted(owner) == [0, 1, 2, 3, 4]
    assert owner == made.similarity(d).argmax(1).tolist()
    held = made.data[:, 2] != 0
    found = measure.sweep(made, d, owner[2], held, [-0.5, 0.0, 0.5])
    with torch.no_grad():
        before = made.model(made.data)
        with l3d.intervene(made.model, d, {owner[2]: 0.5}):
            change = (made.model(made.data) - before).pow(2)
    assert found.holding[2] == pytest.approx(float(change[held].mean().sqrt()), rel=1e-5)
    assert found.without[2] == pytest.approx(float(change[~held].mean().sqrt()), rel=1e-5)
    assert found.holding[1] == found.without[1] == 0
    assert found.ratio > 2


def test_pairs_follow_their_own_subnetworks(toy: tuple[Any, Decomposition]) -> None:
    """A sample with one of two features follows that one's δ, and interactions are symmetric, zero with itself."""
    made, d = toy
    found = measure.pairwise(made, d, measure.owners(made, d), 0, 1)
    only = torch.tensor(found.changes["only 0"])
    assert only.std(0).mean() > 5 * only.std(1).mean()
    interaction = torch.tensor(found.interaction)
    assert torch.equal(interaction, interaction.mT)
    assert interaction.diagonal().abs().max() == 0
    assert interaction.max() < 0.5


def test_direction_cosines_are_those_of_the_recovery(toy: tuple[Any, Decomposition]) -> None:
    """Of the decoder, they are the toy's own similarity."""
    made, d = toy
    assert torch.allclose(measure.direction_cosines(made, d.decoder), made.similarity(d), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_command_makes_every_figure(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SVG, PNG, numbers and a page that asks for nothing, the same bytes twice; with few steps and points, for time.

    The command is that of docs/lab/paper.md.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies, "SEEDS", 2)
    original, make = studies.decompose, studies.make

    def few(name: str, seed: int) -> l3d.toys.Toy:
        """One network for both seeds, each with points of its own."""
        made = make(name, 0)
        return replace(made, data=made.data[96 * seed : 96 * (seed + 1)])

    monkeypatch.setattr(studies, "make", few)

    def short(*arguments: Any, **options: Any) -> Decomposition:
        return original(*arguments, **options | {"steps": 10, "n_restarts": 1})

    monkeypatch.setattr(studies, "decompose", short)
    assert main(["paper", name]) == 0
    out = tmp_path / "runs" / f"paper-{name}"
    figures = json.loads((out / "figures.json").read_text())["figures"]
    assert list(figures) == FIGURES[name]
    for figure in FIGURES[name]:
        assert ElementTree.parse(out / f"{figure}.svg").getroot().tag.endswith("svg")
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert figures[figure]["caption"]
    for figure in {"error-rank", "error-k"} & set(figures):
        assert len(figures[figure]["error_by_seed"]) == 2
    page = (out / "index.html").read_text()
    assert page.count("<svg") == len(FIGURES[name])
    assert "<script" not in page
    assert "src=" not in page
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    if name == "tms":
        assert main(["paper", name, "--out", str(out)]) == 2
        assert "exists and is not an empty folder" in capsys.readouterr().err
        assert main(["paper", name, "--out", str(out), "--overwrite"]) == 0
        assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_a_name_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written for an unknown study, nor into a folder of something else."""
    assert main(["paper", "tms_40_10", "--out", str(tmp_path / "a")]) == 2
    assert "paper: expected one of tms, tmcs, high_rank, squared, got 'tms_40_10'" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    assert main(["paper", "tms", "--out", str(tmp_path / "mine"), "--overwrite"]) == 2
    assert "holds no figures of l3d" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "letter.txt"]


def test_results_are_shown_in_one_line() -> None:
    """Sizes and the scalar figure, never the lists."""
    assert repr(measure.Sweep([-1.0, 1.0], [3.0, 4.0], [1.0, 0.0])) == "Sweep(2 deltas; ratio 5)"
    grid = [[0.0, 0.5], [0.5, 0.0]]
    found = measure.Pairwise([-1.0, 1.0], {"both": grid}, grid)
    assert repr(found) == "Pairwise(2 deltas, kinds ['both']; largest interaction 0.5)"
