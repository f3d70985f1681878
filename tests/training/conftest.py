"""Share fixtures among the tests of whole training runs."""

import pytest


@pytest.fixture
def one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each step run the model once, so that tests can interrupt a step by a call of the model's."""
    monkeypatch.setattr("l3d.gradients.ahead.MOST", 1)
