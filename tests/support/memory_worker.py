"""Train again and again, or for many steps: `python memory_worker.py calls|MODEL TIMES FOLDER`; prints what it holds.

The last line is JSON: the bytes held after a sixth, and at the end.
"""

import gc
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import l3d
from l3d.training.memory import memory_now

from process_worker import ARGUMENTS, convolution, language
from small_models import mlp

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp": (lambda: (mlp(), torch.randn(40, 4)), {}),
    "language": (language, {"divergence": "kl", "batch_size": 4}),
    "convolution": (convolution, {"reference": "mean", "memory": l3d.Memory(micro_batch_size=5)}),
}


def held() -> int:
    gc.collect()
    return memory_now()


def calls(times: int, folder: Path) -> list[int]:
    """Make so many calls of all kinds in turn; each third writes a run folder, which the next of its kind replaces."""
    found = []
    for i in range(times):
        name = list(KINDS)[i % len(KINDS)]
        make, own = KINDS[name]
        out = {"out": folder / name, "existing": "overwrite"} if i // len(KINDS) % 3 == 0 else {}
        d = l3d.decompose(*make(), **ARGUMENTS | {"steps": 5} | own | out)
        d.evaluate(*make())
        gc.collect()  # else its own moments decide how many models wait for it at once, and so what the heap grows to
        if i + 1 in (times // 6, times):
            found.append(held())
    return found


def steps(name: str, times: int) -> list[int]:
    """Take so many steps of one kind."""
    found: list[int] = []

    class Look(l3d.callbacks.Callback):
        def on_step(self, step: int, figures: Mapping[str, float]) -> None:
            if (step >= times // 6 and not found) or step == times:
                found.append(held())

    make, own = KINDS[name]
    l3d.decompose(*make(), **ARGUMENTS | {"steps": times, "callbacks": [Look()]} | own)
    return found


if __name__ == "__main__":
    what, times, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays
    print(json.dumps(calls(times, folder) if what == "calls" else steps(what, times)))
