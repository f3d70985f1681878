"""Check random cases, each drawn from a number of its own, and print what was counted: for tests/long."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from random import Random

import pytest
import torch

MANY, PARTS, SHORT = 2000, 4, 60  # cases of the long form, its parts, and cases of the short form

in_parts = pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, PARTS + 1))], ids="part{}".format
)


@contextmanager
def seeded(seed: int) -> Iterator[Random]:
    """Seed torch's generator and another by one number, and make tensors float64 while the block runs."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float64)
        try:
            yield Random(seed)
        finally:
            torch.set_default_dtype(before)


def run_part(check: Callable[[int], Mapping[str, int]], part: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Check the numbers of one part (0: the short form); print the counts, and what was refused, by number.

    check: returns counts, raises ValueError where a case is refused, and anything else where something is wrong. At
    most one case in twenty may be refused.
    """
    seeds = range(SHORT) if part == 0 else range((part - 1) * MANY // PARTS, part * MANY // PARTS)
    counts: Counter[str] = Counter()
    refused, wrong = [], []
    for seed in seeds:
        try:
            counts.update(check(seed))
            counts["right"] += 1
        except ValueError as error:
            refused.append(f"{check.__name__}({seed}) was refused: {error}")
        except Exception as error:
            wrong.append(f"{check.__name__}({seed}): {type(error).__name__}: {error}")
    counts["refused"] += len(refused)
    with capsys.disabled():
        print(
            f"\n{check.__name__}, part {part}: {len(seeds)} cases, {len(wrong)} wrong; {dict(counts)}",
            *refused,
            sep="\n",
        )
    assert not wrong, "\n".join(wrong)
    assert len(refused) <= len(seeds) / 20
    assert all("\n" not in line for line in refused)
