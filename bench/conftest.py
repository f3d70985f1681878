"""What pytest-benchmark's JSON says of the machine: our own account, beside its own."""

from typing import Any

from bench.environment import environment


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["l3d"] = environment()
