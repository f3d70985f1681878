"""What a step asks of a GPU, counted on tensors that have shapes only: launches, and waits for the device."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from bench.gpu.block import BLOCKS, StepSizes
from bench.gpu.model import count
from bench.measure.launches import counting

META = torch.device("meta")
MOST = {"TinyStories-8M": 216, "width 2048": 214, "width 4096": 226}  # launches of a step, extraction included


@pytest.mark.parametrize("size", BLOCKS, ids=lambda size: size.name)
def test_a_step_between_two_rows_of_the_history(size: StepSizes, capsys: pytest.CaptureFixture[str]) -> None:
    """It waits for nothing, and makes so many launches; the counts are printed."""
    counted = count(size, "bf16")
    launches, waits = ({phase: getattr(c, name) for phase, c in counted.items()} for name in ("launches", "waits"))
    total = sum(launches.values())
    with capsys.disabled():
        print(f"\n{size.name}, bfloat16: {total} launches {launches}, {sum(waits.values())} waits")
    assert not any(waits.values()), waits
    assert 0 < total <= MOST[size.name]


WAITS: dict[str, Any] = {
    "a number": lambda t: t.sum().item(),
    "a truth": lambda t: bool((t > 0).all()),
    "a list": lambda t: t.tolist(),
    "a copy to the host": lambda t: t.cpu(),
    "a copy from the host": lambda t: torch.ones(3).to(t.device),
    "the places of what is not zero": lambda t: t.nonzero(),
    "boolean indexing": lambda t: t[t > 0],
    "a copy into a tensor": lambda t: t.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_seen(name: str) -> None:
    """Each kind of wait counts as one."""
    tensor = torch.empty(3, device=META)
    with counting(META) as seen:
        try:
            WAITS[name](tensor)
        except (NotImplementedError, RuntimeError) as error:  # a shape that depends on values has none on meta
            assert "meta" in str(error).lower() or "nonzero" in str(error)  # noqa: PT017
    assert seen.waits.total() == 1


def test_what_is_counted_as_a_launch() -> None:
    """Operations on the device; no views, no empty tensors, nothing on the host, no copy that is not waited for."""
    layer = nn.Linear(4, 3, device=META)
    with counting(META) as seen:
        y = layer(torch.empty(2, 4, device=META)).view(6)[1:3]
        torch.ones(3) + 1
        y.detach()
        torch.ones(2).to(META, non_blocking=True)
    assert seen.launches == Counter({"addmm": 1, "_to_copy": 1})
    assert seen.waits == Counter()


def test_our_kernels_count_each() -> None:
    """An operator of ours counts as the kernels that it launches."""
    import l3d_kernels as lk

    with counting(META) as seen:
        lk.batch_topk(torch.empty(64, 32, device=META), 10, backend="triton")
    own = [name for name in seen.launches if name.startswith("l3d::")]
    assert len(own) >= 5
