"""`project_topk` on random shapes in Triton's interpreter: T, R and K from 1 to 40, four dtypes, ties, all zero."""

import pytest

from random_topk import check, draw, own_coefficients, select

PARTS, MANY = 25, 500


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(i, marks=pytest.mark.slow_kernels) for i in range(2, PARTS))])
def test_random_shapes(part: int) -> None:
    """On small integers the exact kept set; else the top of the kernel's own coefficients, which are as the twin's."""
    for seed in range(part, MANY, PARTS):
        i = draw(seed)
        try:
            check(i, select(i, "triton"), own_coefficients(i))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
