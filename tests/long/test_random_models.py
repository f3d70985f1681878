"""Extract the gradients of random models, each compared with a loop of autograd over its samples, in float64.

`make test-long` takes 2,000 models, in parts that can be run apart: pytest tests/long/test_random_models.py -m long -k
part2. A short form is part of `make test`. Failures name the model's number, from which `check_model` draws it again.
"""

import pytest

from random_cases import in_parts, run_part
from random_models import check_model


@in_parts
@pytest.mark.filterwarnings("ignore:params. the output does not depend on:UserWarning")
def test_random_models(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Every tensor and norm is the loop's, and the model is as it was."""
    run_part(check_model, part, capsys)
