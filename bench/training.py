"""How training fares over sizes, settings and presets: `python -m bench.training NAME`.

    stability   K x rank on a real attention block, one and the same defaults, 600 steps
    presets     default beside published on that block, 3,000 steps, and with half of the steps; on two kinds of windows
    toys        default beside published on the toys, 3,000 steps, ten seeds
    ablations   one setting of the default changed at a time, and published, on the block

Runs of one block share the gradients of every batch, so they differ in nothing but what is compared. Each prints a
table and writes bench/results/training-NAME.json, with the environment; docs/lab/ablations.md shows the tables. The
block is layer 2's attention of the small language model in $L3D_DATA, on windows of 16 tokens.
"""

import argparse
import inspect
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import l3d
from bench.measure.environment import RESULTS, environment
from l3d.api import Decomposition
from l3d.data.batches import count_rows
from l3d.data.sources import load_data, load_model
from l3d.gradients.extract import Extractor
from l3d.toys import make, one_thread
from l3d.train import turn
from l3d.training.run import Run
from l3d.training.settings import Settings, resolve

LENGTH = 16  # tokens
HELD_OUT = 200  # windows, the last ones
# The defaults of `decompose` that settings are resolved from, and what is chosen otherwise for the block.
DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(l3d.decompose).parameters.items()}
CHOICES: dict[str, Any] = {name: DEFAULTS[name] for name in {f.name for f in fields(Settings)} & set(DEFAULTS)}
CHOICES |= {"rank": 6, "params": "model.layers.2.self_attn.*", "divergence": "kl"}


class Block:
    """The attention block of a small language model, and texts.

    Args:
        plain: windows of each text as it is, after its one BOS; else every window has a BOS of its own.
    """

    def __init__(self, plain: bool = False) -> None:
        folder = os.environ.get("L3D_DATA")
        if not folder:
            raise SystemExit("L3D_DATA: set it to the folder of stories260k and stories.txt")
        model = f"hf:{folder}/stories260k"
        self.model = load_model(model)
        data = (
            plain_windows(folder) if plain else load_data(f"text:{folder}/stories.txt", model_spec=model, length=LENGTH)
        )
        self.train, self.held_out = data[:-HELD_OUT], data[-HELD_OUT:]

    def run(self, variants: Mapping[str, Mapping[str, Any]], steps: int, report: Callable[[str], None]) -> list[dict]:
        """Train all variants on the same batches, and return a row of figures for each."""
        runs = {}
        for name, changes in variants.items():
            chosen = {**CHOICES, "steps": steps, **changes}
            settings = resolve(chosen, count_rows(self.train))
            extractor = Extractor(self.model, "kl", "sample", settings.params)
            runs[name] = Run(settings, extractor, self.train, torch.device("cpu"), build=Decomposition)
            runs[name].check()  # which also makes ready for exchanges
        first = next(iter(runs.values()))
        seconds = dict.fromkeys(runs, 0.0)
        for step in range(steps):
            gradients = first.gradients(step)
            for name, run in runs.items():
                started = time.perf_counter()
                turn(run, gradients)
                seconds[name] += time.perf_counter() - started
            if (step + 1) % 100 == 0:
                shown = ", ".join(f"{name} {run.recorder.history['error'][-1]:.3f}" for name, run in runs.items())
                report(f"step {step + 1}: {shown}")
        rows = []
        for name, run in runs.items():
            d = run.best()
            errors = d.history["error"]
            rows.append(
                {
                    "variant": name,
                    "error": run.final_errors()[0],  # of the last tenth of the training batches
                    "error_at_half": statistics.mean(errors[len(errors) // 2 - len(errors) // 20 : len(errors) // 2]),
                    "of_training_rows": d.evaluate(self.model, self.train[:: len(self.train) // 400][:400]).error,
                    "held_out": d.evaluate(self.model, self.held_out).error,
                    "dead": d.history["dead_fraction"][-1],
                    "ms_per_step": 1000 * seconds[name] / steps,  # without the extraction
                }
            )
        return rows


def stability() -> list[dict]:
    """Train every K x rank with the defaults."""
    variants = {
        f"K={k} rank {rank}": {"n_subnetworks": k, "rank": rank} for k in (50, 100, 400, 1000) for rank in (1, 6, 32)
    }
    return Block().run(variants, 600, print)


def plain_windows(folder: str) -> torch.Tensor:
    """Cut texts, each after one BOS, into windows of LENGTH ids; shorter tails are dropped: int64 [n, LENGTH]."""
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/stories260k")
    texts = (text.strip() for text in Path(folder, "stories.txt").read_text(encoding="utf-8").split("<|endoftext|>"))
    ids = [[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)] for text in texts if text]
    return torch.tensor([own[i : i + LENGTH] for own in ids for i in range(0, len(own) - LENGTH + 1, LENGTH)])


def presets() -> list[dict]:
    """Train by the default preset and by the published one, and in half of the steps."""
    variants = {"default": {}, "published": {"preset": "published"}}
    rows = []
    for windows, plain in (("BOS each", False), ("plain", True)):
        block = Block(plain)
        for steps in (3000, 1500):
            rows += [{"windows": windows, "steps": steps} | row for row in block.run(variants, steps, print)]
    return rows


def ablations() -> list[dict]:
    """Change one setting of the default at a time."""
    variants: dict[str, dict[str, Any]] = {
        "default": {},
        "published": {"preset": "published"},
        "no warm start": {"warm_start": 0},
        "warm start over half of the run": {"warm_start": 500},
        "lr .05": {"lr": 0.05},
        "lr .2": {"lr": 0.2},
    }
    return Block().run(variants, 1000, print)


def toys() -> list[dict]:
    """Train toys by either preset for 3,000 steps, one restart each, over ten seeds."""
    rows = []
    for name in ("tms", "tms_40_10", "tmcs", "high_rank", "squared"):
        errors: dict[str, list[float]] = {"default": [], "published": []}
        for seed in range(10):
            toy = make(name, seed)
            for preset, found in errors.items():
                own = {**toy.settings, "steps": 3000, "n_restarts": 1, "preset": preset, "seed": seed}
                with one_thread():
                    d = l3d.decompose(toy.model, toy.data, callbacks=[], **own)
                    found.append(d.evaluate(toy.model, toy.data[:1000], n_references=30).error)
            print(f"{name}, seed {seed}: " + ", ".join(f"{p} {found[-1]:.4f}" for p, found in errors.items()))
        medians = {preset: statistics.median(found) for preset, found in errors.items()}
        differences = [ours - theirs for ours, theirs in zip(errors["default"], errors["published"], strict=True)]
        lower = sum(difference < 0 for difference in differences)
        medians |= {"median difference": statistics.median(differences), "seeds lower": lower}
        rows.append({"variant": name} | medians | {"all": errors})
    return rows


def table(rows: list[dict]) -> str:
    """Write rows as a table."""
    columns = [name for name in rows[0] if name != "all"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        shown = [f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


BENCHES = {bench.__name__: bench for bench in (stability, presets, toys, ablations)}


def main() -> None:
    """Run one of the benches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHES)
    name = parser.parse_args().name
    rows = BENCHES[name]()
    path = RESULTS / f"training-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
