"""One training step by each method, and restarts side by side: `make bench`.

The losses agree before anything is timed. `python -m bench.steps` measures the same cases with peak memory, for the
README.
"""

import pytest
import torch

from bench.cases import CASES, METHODS
from l3d.toys import make, one_thread
from l3d.train import decompose


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ["tms", "stories"])
def test_step(benchmark, case, method):
    """Time one step; the method's loss agrees with ours first."""
    benchmark.group = f"one step: {case}"
    made = CASES[case]()
    assert torch.allclose(made.loss("l3d"), made.loss(method), rtol=1e-4)
    rounds = 3 if (case, method) == ("stories", "published") else 20
    benchmark.pedantic(lambda: made.step(method), rounds=rounds, warmup_rounds=1)


@pytest.mark.parametrize("n_restarts", [1, 10])
def test_restarts(benchmark, n_restarts):
    """Time 200 steps of the toy model of superposition, alone and as ten restarts side by side."""
    benchmark.group = "200 steps: tms"
    toy = make("tms")
    own = {**toy.settings, "steps": 200, "n_restarts": n_restarts}
    with one_thread():
        d = benchmark.pedantic(lambda: decompose(toy.model, toy.data, progress=False, **own), rounds=3, warmup_rounds=1)
    assert len(d.restart_errors) == n_restarts
