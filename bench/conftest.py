"""What pytest-benchmark's JSON says of the machine: our own account, taken at the start, beside its own."""

from typing import Any

import pytest

from bench.measure.environment import environment

ACCOUNT = pytest.StashKey[dict[str, Any]]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[ACCOUNT] = environment()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["l3d"] = config.stash[ACCOUNT]
