"""The kernel tests run in Triton's interpreter; fresh outputs are filled with NaN first."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported, at the first call


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every fresh output with NaN, so that an element that no kernel writes is seen."""
    from l3d_kernels import registry

    assert registry.load_kernels() == ""
    from l3d_kernels.kernels.shared import common

    monkeypatch.setattr(common, "POISON", True)
