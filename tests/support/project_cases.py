"""Problems for the kernels that project: sizes that need several tiles, and sizes of zero."""

from typing import Any

from op_cases import Case
from op_cases import make as make_all

# in the interpreter a tile is 16 x 16, and 32 elements deep
CASES = {
    "shared": Case(),
    "one sample a sequence": Case(B=5, S=5),
    "several tiles": Case(B=2, S=4, T=11, I=35, O=33, K=5, R=5),
    "several tiles, one sample a sequence": Case(B=4, S=4, T=11, I=35, O=33, K=5, R=5),
    "many positions": Case(B=1, S=2, T=37, K=2),
    "many ranks": Case(B=3, S=3, T=2, K=2, R=19),
    "one position, rank one": Case(B=19, S=19, T=1, K=18, R=1),
    "one position, shared": Case(B=1, S=17, T=1, K=1, R=3),
    "indices": Case(indices=True),
    "indices that repeat": Case(B=3, S=3, T=7, I=2, indices=True),
    "one of everything": Case(B=1, S=1, T=1, I=1, O=1, K=1, R=1),
}
EMPTY = {
    "no samples": Case(S=0),
    "no sequences": Case(B=0, S=0),
    "no subnetworks": Case(K=0),
    "no positions": Case(T=0),
    "rank zero": Case(R=0),
}


def make(case: Case) -> dict[str, Any]:
    inputs = make_all(case)
    return {name: inputs[name] for name in ("x", "dy", "left", "right")}


def leaves(case: Case) -> tuple[str, ...]:
    return ("dy", "left", "right") if case.indices else ("x", "dy", "left", "right")
