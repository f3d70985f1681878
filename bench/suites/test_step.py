"""One training step by each provider; on a GPU also our own step by torch and by kernels.

The losses agree before anything is timed. `python -m bench.steps` measures the same cases, methods taking turns, with
TinyStories-8M's shape, of which a published step takes half a minute, for docs/benchmarks/steps.md.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from bench.gpu.block import BLOCKS, Step
from bench.measure import gate, peak
from bench.measure.timing import METHODS, device_of, timed
from bench.methods.cases import CASES
from bench.methods.providers import BACKENDS
from l3d.toys import one_thread


def prepared(name: str, provider: str) -> Callable[[], None]:
    """Return the steps that share work, for `bench.measure.peak.of`."""
    case, method = CASES[name](), METHODS[provider]

    def steps() -> None:
        for _ in range(case.together(method)):
            case.step(method)

    return steps


@pytest.mark.parametrize("provider", METHODS)
@pytest.mark.parametrize("name", ["tms", "stories"])
def test_step(benchmark, name, provider):
    """Time one step, the mean of those that share work; the provider's loss agrees with ours first."""
    sizes = {} if benchmark.enabled or name == "tms" else {"n_texts": 2}
    case, method = CASES[name](**sizes), METHODS[provider]
    gate.check_loss(f"a step of {name} by {provider}", case.loss(method), case.loss("l3d"))
    with one_thread():
        timed(
            benchmark,
            f"one step, {name}",
            provider,
            partial(case.step, method),
            peak=partial(peak.of, prepared, name, provider),
            rounds=40 if name == "tms" else 5,
            iterations=case.together(method),
        )


@pytest.mark.parametrize("provider", BACKENDS)
def test_step_of_a_block(benchmark, provider):
    """Time one step of an attention block of TinyStories-8M's shape on a GPU; both backends give the same loss."""
    device_of("l3d triton")
    sizes, device = BLOCKS[0], torch.device("cuda")
    losses = [Step(sizes, torch.float32, device, backend).take() for backend in (BACKENDS[provider], "torch")]
    gate.check_loss(f"a step of a block by {provider}", *losses)
    step = Step(sizes, torch.float32, device, BACKENDS[provider])
    timed(benchmark, f"one step, block of {sizes.name}", provider, step.take, rounds=20)
