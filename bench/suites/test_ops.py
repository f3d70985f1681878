"""Every public operation of l3d_kernels by each provider, forward, and backward where training takes it.

Its value and gradients are held to the definition in float64 before it is timed. Where nothing is timed (`make test`)
sizes are tiny: then the tests show that everything runs. `bench/gpu` times the kernels alone, beside what bounds them.
"""

from functools import lru_cache

import pytest
import torch

from bench.gpu.cases import Inputs, Sizes, moved_bytes
from bench.measure import gate, peak
from bench.measure.timing import QUICK, device_of, timed
from bench.methods.providers import PUBLIC, SHAPES, TINY, calls_of, inputs_of, outcome_of, prepared, truth_of

pytestmark = QUICK
CASES = [
    (name, shape, part, provider)
    for name, compared in PUBLIC.items()
    for shape in SHAPES
    for part in ("forward", "backward")[: 1 + compared.trains]
    for provider in compared.providers()
]


@lru_cache(maxsize=1)  # all providers of one operation at one shape come one after another
def problem(name: str, sizes: Sizes, device: torch.device) -> tuple[Inputs, dict[str, torch.Tensor]]:
    """Draw an operation's inputs and compute the truth."""
    inputs = inputs_of(name, sizes, device)
    return inputs, truth_of(name, inputs)


@lru_cache(maxsize=4)
def admitted(name: str, sizes: Sizes, provider: str, device: torch.device) -> None:
    """Refuse a provider whose value or gradients are not the truth's."""
    inputs, truth = problem(name, sizes, device)
    gate.check(f"{name} by {provider}, {sizes.name}", outcome_of(name, inputs, provider), truth)


@pytest.mark.parametrize("name, shape, part, provider", CASES, ids=["-".join(case) for case in CASES])
def test_op(benchmark, name, shape, part, provider):
    """Time one pass of an operation."""
    device = device_of(provider)
    op, sizes = PUBLIC[name].op, SHAPES[shape] if benchmark.enabled else TINY
    admitted(name, sizes, provider, device)
    inputs, _ = problem(name, sizes, device)
    taken = {key: inputs[key] for key in op.takes}
    output = op.run(taken, "torch")
    work, moved = op.flops(sizes, inputs), moved_bytes(op, sizes, taken, output)
    if part == "backward":  # two products as large as the forward pass's one; what is written are gradients
        work *= 2
        moved = moved_bytes(op, sizes, {**taken, "upstream": output}, tuple(taken[key] for key in op.leaves))
    timed(
        benchmark,
        f"{name}, {shape}, {part}",
        provider,
        calls_of(name, inputs, provider)[part],
        peak=lambda: peak.of(prepared, name, shape, part, provider),
        flops=work,
        bytes=moved,
        sizes=sizes._asdict(),
    )
