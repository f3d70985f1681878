"""Whole decompositions: 200 steps of the toy model of superposition, by each provider from its first step to its last.

A baseline is its step in a loop over batches of the same points. Each must have learned, or its time is not reported.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench.measure import gate, peak
from bench.measure.timing import METHODS, timed
from bench.methods import afternoon, published
from bench.methods.cases import CASES, Case
from l3d.toys import make, one_thread
from l3d.train import decompose

STEPS = 200


def loop(method: str) -> tuple[float, float]:
    """Train by a baseline of bench.methods.cases.METHODS; return the loss of the first batch before and after."""
    case, data = CASES["tms"](), make("tms").data
    first = case.inputs
    before = loss_of(case, method)
    order = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        case.inputs = data[torch.randperm(len(data), generator=order)[: len(first)]]
        case.step(method)
    case.inputs = first
    return before, loss_of(case, method)


@torch.no_grad()
def loss_of(case: Case, method: str) -> float:
    """Return the loss of a batch by what a baseline has trained."""
    if method == "published":
        trained = case.as_published
        return float(published.loss(case.jacobian(), trained.encoder, trained.decoder, case.n_kept()))
    pairs = case.by_afternoon
    return float(afternoon.loss(case.vectors(), pairs.encoder, pairs.decoder, case.n_kept()))


def ours(n_restarts: int) -> tuple[float, float]:
    """Train by `l3d.decompose`; return the error of the first steps and of the last."""
    toy = make("tms")
    own = toy.settings | {"steps": STEPS, "n_restarts": n_restarts}
    d = decompose(toy.model, toy.data, callbacks=[], **own)
    assert len(d.restart_errors) == n_restarts
    return d.history["error"][0], d.history["error"][-1]


def run(provider: str, n_restarts: int) -> None:
    """Decompose from first to last step; Refused where nothing was learned, which leaves the time out."""
    before, after = ours(n_restarts) if provider == "l3d torch" else loop(provider)
    if not after < gate.LEARNED * before:
        raise gate.Refused(
            f"{STEPS} steps by {provider}: the error went from {before:.3f} to {after:.3f}; not reported"
        )


def prepared(provider: str, n_restarts: int) -> Callable[[], None]:
    """Return a whole decomposition, for `bench.measure.peak.of`."""
    return partial(run, provider, n_restarts)


@pytest.mark.parametrize("provider, n_restarts", [*((each, 1) for each in METHODS), ("l3d torch", 10)])
def test_decomposition(benchmark, provider, n_restarts):
    """Time a whole run, or ten restarts in one."""
    group = f"{STEPS} steps, tms" + (f", {n_restarts} restarts" if n_restarts > 1 else "")
    with one_thread():
        memory = partial(peak.of, prepared, provider, n_restarts)
        timed(benchmark, group, provider, prepared(provider, n_restarts), peak=memory, rounds=3)
