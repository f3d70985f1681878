"""What exchanges find that descent alone does not: `python -m bench.exchanges [KIND ...]`.

Planted networks (methods/planted.py), five of each kind, and the toy tms_40_10, ten seeds: each with four starts by the
defaults, once without exchanges and once with them, and a last time from the circuits themselves, which shows what
there is to be found. MMCS is over all entries of the matrices, on tms_40_10 over each feature's own weights. Prints a
table; all kinds together take minutes and write bench/results/exchanges.json, which docs/lab/ablations.md shows.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.measure.environment import RESULTS, environment
from bench.methods.planted import Direction, Planted, perceptron
from bench.training import CHOICES, table
from l3d.api import Decomposition
from l3d.data.batches import count_rows
from l3d.decomposition.directions import LowRank, Whole
from l3d.gradients.extract import Extractor
from l3d.toys import make, one_thread
from l3d.toys.recovery import distinct, similarity
from l3d.train import train as run_loop
from l3d.training.run import Run
from l3d.training.settings import resolve

STARTS = 4
WAYS = ("without", "with", "from the circuits")
TOY = "tms_40_10"
PLANTED: dict[str, Callable[[int], Planted]] = {
    "6 circuits": partial(perceptron, n=6, share=0.08),
    "6, unequal gains": partial(perceptron, n=6, share=0.08, gains=(0.7, 1.3)),
    "10": partial(perceptron, n=10, share=0.05),
    "10, three layers": partial(perceptron, n=10, share=0.05, n_layers=3),
    "10, with biases": partial(perceptron, n=10, share=0.05, bias=True),
    "30": partial(perceptron, n=30, share=0.03, n_rows=10000),
    "7, linear, signed": partial(perceptron, n=7, share=0.08, activation=nn.Identity, signed=True),
}
SEEDS = dict.fromkeys(PLANTED, 5) | {TOY: 10}


class Problem(NamedTuple):
    """What to decompose, what is to be found in it, and the settings that are not the defaults."""

    model: nn.Module
    data: Tensor
    circuits: list[Direction]
    chosen: dict[str, Any]


class Start(NamedTuple):
    """How one start ended."""

    mmcs: float
    missed: int  # circuits whose best subnetwork is another's too
    error: float


def problem(kind: str, seed: int) -> Problem:
    """Make a problem of a kind."""
    if kind == TOY:
        toy = make(TOY, seed)
        chosen = {name: value for name, value in toy.settings.items() if name != "n_restarts"}
        return Problem(toy.model, toy.data, toy.truth, chosen | {"seed": seed})
    planted = PLANTED[kind](seed)
    chosen = {"n_subnetworks": len(planted.circuits), "rank": 1, "k": round(planted.share, 3), "seed": seed}
    return Problem(planted.model, planted.data, planted.circuits, chosen)


def train(made: Problem, way: str, own: bool) -> list[Start]:
    """Decompose in one of `WAYS`, and compare every start's subnetworks with the circuits."""
    chosen = {**CHOICES, "preset": "default", "params": None, "divergence": "mse", **made.chosen}
    settings = resolve(chosen, count_rows(made.data))
    extractor = Extractor(made.model, settings.divergence, settings.reference, settings.params)
    n = 1 if way == "from the circuits" else STARTS
    run = Run(settings, extractor, made.data, torch.device("cpu"), n)
    if way == "from the circuits":
        set_to(run.decomposition, made.circuits)
    run.check()
    if way == "without":
        run.probe = None
    run_loop(run)
    starts = []
    for i, error in enumerate(run.final_errors()):
        found = run.decomposition.part(i, n)
        mmcs = float(similarity(made.circuits, found, own).amax(1).mean())
        starts.append(Start(mmcs, len(made.circuits) - distinct(similarity(made.circuits, found)), error))
    return starts


@torch.no_grad()
def set_to(decomposition: Decomposition, circuits: list[Direction]) -> None:
    """Make subnetwork i the best approximation to circuit i that its ranks allow, without biases, of length one."""
    for side in (decomposition.encoder, decomposition.decoder):
        for name, piece in side.items():
            if isinstance(piece, Whole):
                piece.vector.zero_()
                continue
            assert isinstance(piece, LowRank)
            u, s, v = torch.linalg.svd(torch.stack([circuit[name] for circuit in circuits]), full_matrices=False)
            rank = piece.left.shape[1]
            piece.left.copy_((u * s[:, None].sqrt())[..., :rank].mT)
            piece.right.copy_((s[..., None].sqrt() * v)[:, :rank])
        side.normalize_()


def compare(kind: str) -> dict[str, Any]:
    """Train a kind in all ways over its seeds: a row of the table, with every start under "all"."""
    every: dict[str, list[list[Start]]] = {way: [] for way in WAYS}
    for seed in range(SEEDS[kind]):
        for way, found in every.items():
            found.append(train(problem(kind, seed), way, kind == TOY))
        shown = "; ".join(f"{way} " + " ".join(f"{start.mmcs:.3f}" for start in every[way][-1]) for way in WAYS)
        print(f"{kind}, seed {seed}: {shown}", flush=True)
    row: dict[str, Any] = {"kind": kind}
    for way, found in every.items():
        scores = [start.mmcs for starts in found for start in starts]
        row |= {f"{way}, median": statistics.median(scores), f"{way}, least": min(scores)}
    best = [min(starts, key=lambda start: start.error) for starts in every["with"]]
    row |= {"best of four, least": min(start.mmcs for start in best)}
    row |= {"best of four, circuits missed": sum(start.missed for start in best)}
    known = [min(start.error for start in a + b) for a, b in zip(every["without"], every["with"], strict=True)]
    for way in ("without", "with"):
        at = sum(s.error <= least + 0.001 for starts, least in zip(every[way], known, strict=True) for s in starts)
        row |= {f"{way}, at the least error": f"{at} of {STARTS * len(known)}"}
    return row | {"all": every}


def main() -> None:
    """Run the kinds that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"some of: {'; '.join(SEEDS)} (default: all)")
    kinds = parser.parse_args().kinds
    for kind in kinds:
        if kind not in SEEDS:
            parser.error(f"KIND: expected some of {'; '.join(SEEDS)}, got {kind!r}")
    with one_thread():
        rows = [compare(kind) for kind in kinds or SEEDS]
    print(table(rows))
    if not kinds:
        path = RESULTS / "exchanges.json"
        written = {"environment": environment(), "all": Start._fields, "rows": rows}
        path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
