"""What the suites share: where a provider runs, and how one figure is taken by pytest-benchmark.

A suite's tests are grouped by what is computed, so that a group's rows are providers of the same thing. Besides times,
`extra_info` holds the provider, the peak memory that a call adds in a process of its own, and what is counted.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.methods.providers import PROVIDERS

METHODS = {"published": "published", "afternoon": "afternoon", "l3d torch": "l3d"}  # as bench.methods.cases names them
QUICK = pytest.mark.benchmark(max_time=0.3, min_rounds=3)


def device_of(provider: str) -> torch.device:
    """Return where a provider runs: on a GPU where there is one, but the kernels nowhere else. Skips there."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if provider == "l3d triton":
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    return torch.device("cpu")


def timed(
    benchmark: Any,
    group: str,
    provider: str,
    call: Callable[[], Any],
    peak: Callable[[], int] | None = None,
    rounds: int | None = None,
    iterations: int = 1,
    **counted: Any,
) -> Any:
    """Time a call as one provider's figure of a group, and return what it returned.

    peak: measures the call's memory; asked only where times are taken. rounds: so many, after one to warm up, each of
    so many iterations; else as many as fit into the time of the suite's mark.
    """
    assert provider in PROVIDERS, provider
    benchmark.group = group
    benchmark.extra_info.update(provider=provider, **counted)
    if peak is not None and benchmark.enabled and not torch.cuda.is_available():
        benchmark.extra_info["peak_bytes"] = peak()

    def finished() -> Any:
        result = call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    if rounds is None:
        return benchmark(finished)
    return benchmark.pedantic(finished, rounds=rounds, iterations=iterations, warmup_rounds=1)
