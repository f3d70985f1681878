"""How low could the error on a real block go? `python -m bench.floor`: training with directions of any rank.

L3D's loss on layer 2 of stories260k (K=100, k=.1, plain windows) where no rank holds it back: gradients are projected
onto their first principal directions, and encoder and decoder are free vectors there, trained by Adam with the default
preset's schedule from several starts, step sizes and batch sizes, for up to 30,000 steps. What lies outside the
principal directions counts as error, in training as held out. Takes half an hour and 4 GiB; prints a table and writes
bench/results/floor.json, which docs/lab/ablations.md shows.
"""

import json
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.measure.environment import RESULTS, environment
from bench.training import CHOICES, Block, table
from l3d.data.batches import batches_per_epoch, count_rows
from l3d.gradients.extract import Extractor
from l3d.training.run import Run
from l3d.training.settings import resolve
from l3d_kernels import cpu

N_SUBNETWORKS = 100
BATCHES, HELD_OUT_PASSES = 400, 3  # of 16 windows of 16 positions, hence 102,400 gradients; each pass draws references
FROM, DIRECTIONS, OVER = 40, 1500, 50  # batches that the principal directions are found on, how many, and spare ones
VARIANTS: list[dict[str, Any]] = [
    {"start": "random", "lr": 0.2, "steps": 10_000, "batch": 256},
    {"start": "random", "lr": 0.2, "steps": 10_000, "batch": 256, "seed": 1},
    {"start": "random", "lr": 0.2, "steps": 10_000, "batch": 256, "warm": 0.5},
    {"start": "random", "lr": 0.5, "steps": 10_000, "batch": 256},
    {"start": "random", "lr": 0.3, "steps": 30_000, "batch": 256},
    {"start": "random", "lr": 0.5, "steps": 5_000, "batch": 2048},
    {"start": "single gradients", "lr": 0.2, "steps": 10_000, "batch": 256},
    {"start": "means of clusters", "lr": 0.2, "steps": 10_000, "batch": 256},
]


class Projected(NamedTuple):
    """Gradients by their coordinates [S, DIRECTIONS] in an orthonormal basis, and their whole squared norms [S]."""

    coordinates: Tensor
    squared_norms: Tensor

    def at(self, rows: Tensor | slice) -> "Projected":
        """Choose some."""
        return Projected(self.coordinates[rows], self.squared_norms[rows])


def run_of(block: Block, windows: Tensor) -> Run:
    """Make a run on windows, for the gradients of its batches."""
    chosen = {**CHOICES, "steps": 3000, "preset": "default"}
    settings = resolve(chosen, count_rows(windows))
    extractor = Extractor(block.model, settings.divergence, settings.reference, settings.params)
    return Run(settings, extractor, windows, torch.device("cpu"))


def dense(run: Run, step: int) -> Tensor:
    """Write the gradients of a step's batch out: [S, parameters]."""
    return torch.cat([g.flatten(1) for g in run.extract(step).materialize().values()], 1)


def principal(gradients: Tensor) -> Tensor:
    """Find principal directions by subspace iteration: [parameters, DIRECTIONS], orthonormal."""
    found = torch.randn(gradients.shape[1], DIRECTIONS + OVER, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        found = torch.linalg.qr(gradients.mT @ (gradients @ found)).Q
    turned = torch.linalg.svd(gradients @ found, full_matrices=False).Vh
    return (found @ turned.mT)[:, :DIRECTIONS].contiguous()


def project(run: Run, n_batches: int, basis: Tensor) -> Projected:
    """Project the gradients of a run's first batches."""
    coordinates, norms = [], []
    for step in range(n_batches):
        whole = dense(run, step)
        coordinates.append(whole @ basis)
        norms.append(whole.square().sum(1))
    return Projected(torch.cat(coordinates), torch.cat(norms))


def loss(batch: Projected, encoder: Tensor, decoder: Tensor, k: float) -> Tensor:
    """Return Σ‖g − ĝ‖² / Σ‖g‖² of a batch, whose k largest coefficients are kept."""
    x, norms = batch
    coefficients = x @ encoder.mT
    kept = cpu.batch_topk(coefficients.detach(), round(k * coefficients.numel()))
    mask = torch.zeros_like(coefficients)
    mask[kept.rows, kept.columns] = 1
    outside = (norms - x.square().sum(1)).sum()
    return ((x - (coefficients * mask) @ decoder).square().sum() + outside) / norms.sum()


def begin(kind: str, data: Tensor, generator: torch.Generator) -> Tensor:
    """Make a start: [K, DIRECTIONS], of length one each."""
    if kind == "random":  # as the gradients are spread
        drawn = torch.randn(N_SUBNETWORKS, data.shape[1], generator=generator)
        return F.normalize(drawn * data[:5000].square().mean(0).sqrt())
    if kind == "single gradients":
        return F.normalize(data[torch.randint(len(data), (N_SUBNETWORKS,), generator=generator)])
    weights, unit = data.norm(dim=1), F.normalize(data)  # spherical k-means, by |cos|
    centres = unit[torch.multinomial(weights.square(), N_SUBNETWORKS, generator=generator)]
    for _ in range(30):
        scores = unit @ centres.mT
        nearest = scores.abs().argmax(1)
        signed = data * weights[:, None] * scores.gather(1, nearest[:, None]).sign()
        centres = F.normalize(torch.zeros_like(centres).index_add_(0, nearest, signed))
    return centres


def train(
    seen: Projected,
    held_out: Projected,
    start: str,
    lr: float,
    steps: int,
    batch: int,
    warm: float = 0.1,
    seed: int = 0,
) -> dict[str, float]:
    """Train free directions; return the error of the last tenth of the batches, and the held-out one.

    Args:
        seen, held_out: gradients.
        start: what `begin` takes.
        lr: of Adam, relative to a unit vector's root mean square entry.
        steps, batch: how many, and gradients in each.
        warm: the fraction of the steps over which the kept share falls to k.
        seed: of start and order.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = begin(start, seen.coordinates, generator)
    parameters = [decoder.clone().requires_grad_(), decoder.clone().requires_grad_()]
    encoder, decoder = parameters
    chosen = {**CHOICES, "preset": "default", "steps": steps, "warm_start": int(warm * steps), "k": 0.1}
    chosen["lr"] = lr * (1 / math.sqrt(DIRECTIONS))  # relative to a unit vector's typical entry
    settings = resolve(chosen, None)
    adam = torch.optim.Adam(parameters, fused=True)
    per_epoch = len(seen.coordinates) // batch
    errors, order = [], torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(seen.coordinates), generator=generator)
        rows = order[step % per_epoch * batch :][:batch]
        adam.param_groups[0]["lr"] = settings.learning_rate(step)
        error = loss(seen.at(rows), encoder, decoder, settings.kept_fraction(step))
        for parameter, gradient in zip(parameters, torch.autograd.grad(error, parameters), strict=True):
            parameter.grad = gradient
        adam.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True)
        errors.append(error.item())
    last = errors[-steps // 10 :]
    with torch.no_grad():
        parts = [held_out.at(slice(i, i + 256)) for i in range(0, len(held_out.coordinates), 256)]
        wrong = sum(float(loss(part, encoder, decoder, 0.1) * part.squared_norms.sum()) for part in parts)
    return {"error": sum(last) / len(last), "held_out": wrong / float(held_out.squared_norms.sum())}


def main() -> None:
    """Project the gradients, and train every variant."""
    block = Block(plain=True)
    own, others = run_of(block, block.train), run_of(block, block.held_out)
    basis = principal(torch.cat([dense(own, step) for step in range(FROM)]))
    seen = project(own, BATCHES, basis)
    n_batches = batches_per_epoch(len(block.held_out), others.batches.batch_size)
    held_out = project(others, HELD_OUT_PASSES * n_batches, basis)
    shares = [float(p.coordinates.square().sum() / p.squared_norms.sum()) for p in (seen, held_out)]
    print(f"{DIRECTIONS} principal directions hold {shares[0]:.3f} of the gradients, {shares[1]:.3f} of held-out ones")
    rows = []
    for variant in VARIANTS:
        rows.append({"warm": 0.1, "seed": 0} | variant | train(seen, held_out, **variant))
        print(rows[-1], flush=True)
    print(table(rows))
    path = RESULTS / "floor.json"
    written = {
        "environment": environment(),
        "held": dict(zip(("train", "held_out"), shares, strict=True)),
        "rows": rows,
    }
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
