"""Run batch top-k over several ranks in one process."""

from typing import Any

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels.ops import batch_topk_over_columns, batch_topk_over_ranks


class _Waits(Exception):
    """A rank needs the others' tensors to go on."""


def together(parts: list[Tensor], n: int, backend: str, columns: bool = False) -> list[lk.SparseCoefficients]:
    """Run every rank in one process: each from the start again until it has met all the others."""
    meetings: list[list[Any]] = []

    def rank(i: int) -> Any:
        step = iter(range(99))

        def gathered(own: Tensor) -> Tensor:
            at = next(step)
            if at == len(meetings):
                raise _Waits(own)
            return torch.stack(meetings[at])

        try:
            if columns:
                return batch_topk_over_columns(parts[i], n, i, gathered)
            return batch_topk_over_ranks(
                parts[i], n, lambda t: gathered(t).sum(0), lambda t: gathered(t)[:i].sum(0), backend=backend
            )
        except _Waits as waits:
            return waits.args[0]

    while True:
        results = [rank(i) for i in range(len(parts))]
        if isinstance(results[0], lk.SparseCoefficients):
            return results
        meetings.append(results)
