"""Per-sample gradients by each provider: jacrev over the batch, vmap of grad, and ours, which stay in factors.

All are held to one `torch.autograd.grad` per sample, in float64, before they are timed. One batch by itself: a run on
small batches extracts several together, which is part of a step's time in bench/suites/test_step.py.
"""

from functools import lru_cache, partial

import pytest
import torch
from torch import Tensor

from bench.measure import gate, peak
from bench.measure.timing import METHODS, QUICK, timed
from bench.methods.cases import CASES, Case
from l3d.data.batches import mix
from l3d.gradients.factors import Gradients
from l3d.gradients.fixed import run_fixed
from l3d.toys import one_thread

pytestmark = QUICK
FLOAT32 = 1e-4  # of the largest true element: a model's forward and backward pass


def extracted(case: Case, provider: str) -> Gradients | dict[str, Tensor] | Tensor:
    """Return the batch's gradients as a provider leaves them."""
    if provider == "published":
        return case.jacobian()
    if provider == "afternoon":
        return case.vectors()
    return case.extractor(case.inputs, torch.Generator().manual_seed(mix(0)))


def flat(found: Gradients | dict[str, Tensor] | Tensor) -> Tensor:
    """Lay gradients out as [S, all parameters]."""
    if isinstance(found, Gradients):
        found = found.materialize()
    return found if isinstance(found, Tensor) else torch.cat([grad.flatten(1) for grad in found.values()], dim=1)


def one_by_one(case: Case) -> Tensor:
    """Return every sample's gradient by a backward pass of its own row alone, in float64: [S, all parameters]."""
    with torch.no_grad():
        outputs = run_fixed(case.model, case.inputs)
    references = case.references(outputs.flatten(0, 1) if case.kl else outputs)
    per_row = len(references) // len(case.inputs)
    parameters = [p.requires_grad_() for p in case.extractor.parameters.values()]
    rows = []
    for s, reference in enumerate(references):
        output = run_fixed(case.model, case.inputs[s // per_row, None])
        own = output[:, s % per_row] if case.kl else output
        grads = torch.autograd.grad(case.divergence(own, reference[None]).sum(), parameters)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


@lru_cache(maxsize=1)
def truth(name: str, **sizes: int) -> Tensor:
    """Compute a case's gradients one by one."""
    case = CASES[name](**sizes)
    case.model.double()
    if case.inputs.is_floating_point():
        case.inputs = case.inputs.double()
    return one_by_one(case)


def prepared(name: str, provider: str) -> partial:
    """Return an extraction, for `bench.measure.peak.of`."""
    return partial(extracted, CASES[name](), provider)


@pytest.mark.parametrize("provider", METHODS)
@pytest.mark.parametrize("name", ["tms", "stories"])
def test_extraction(benchmark, name, provider):
    """Time the extraction of one batch's gradients."""
    sizes = {} if benchmark.enabled or name == "tms" else {"n_texts": 2}
    case = CASES[name](**sizes)
    found = flat(extracted(case, provider))
    gate.check(f"{name} by {provider}", {"gradients": found}, {"gradients": truth(name, **sizes)}, FLOAT32)
    with one_thread():
        timed(
            benchmark,
            f"extraction, {name}",
            provider,
            partial(extracted, case, provider),
            peak=lambda: peak.of(prepared, name, provider),
            samples=len(found),
            parameters=found.shape[1],
        )
