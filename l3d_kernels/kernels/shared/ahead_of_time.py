"""List the forms of a kernel that are compiled ahead of time, for GPUs that are not here.

A test compiles each form and looks for register spills, shared memory beyond the limit and missing matrix instructions.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from l3d_kernels.kernels.shared.common import float32_precision
from l3d_kernels.kernels.shared.launch_table import Launch, lookup


class CompileCase(NamedTuple):
    """One kernel with types and constants to compile ahead of time, without a device."""

    kernel: Any  # a @triton.jit function
    dtype: str  # of every pointer not named in `types`: "bf16", "fp16", "fp32"
    constants: dict[str, Any]  # constexprs beside the blocks; None for a pointer that is not passed
    row: Launch
    types: dict[str, str] = {}  # noqa: RUF012  # other arguments' types, such as {"index_ptr": "*i64"}; sizes are i32
    is_matrix: bool = True  # must compile to matrix instructions
    long: bool = False  # compiled by `make test-kernels` only
    divisible: tuple[str, ...] = ("I", "O")  # sizes taken to be multiples of 16

    def name(self) -> str:
        """Return a name that tells the kernel's cases apart: kernel, dtype, constants and unusual types."""
        flags = [f"{key}={value}" for key, value in self.constants.items()]
        types = [f"{key}={value}" for key, value in self.types.items() if value not in ("*i64", "i64")]
        return "-".join([self.kernel.fn.__name__, self.dtype, *flags, *types])


def compile_dtypes(kind: str) -> list[tuple[str, str, str, bool]]:
    """Return every form of a matrix kernel: (pointer type, size class, precision, only in the long test)."""
    exact, fast = float32_precision(True, kind), float32_precision(False, kind)
    return [
        ("bf16", "16", "ieee", False),
        ("fp16", "16", "ieee", True),
        ("fp32", "32", exact, False),
        ("fp32", "32", fast, True),
    ]


def cases_of_kernel(
    kernel: Any,
    kind: str,
    forms: Iterable[tuple[dict[str, Any], bool]] = (({}, False),),
    types: Mapping[str, str] | None = None,
    divisible: tuple[str, ...] = ("I", "O"),
    is_matrix: bool = True,
) -> list[CompileCase]:
    """List a kernel's cases for every dtype, and for every precision of a matrix kernel.

    forms: pairs of (constants, only in the long test). Types of arguments that the kernel does not have are left out.
    """
    own = {name: pointer for name, pointer in (types or {}).items() if name in kernel.arg_names}
    found = []
    for dtype, bits, precision, long in compile_dtypes(kind):
        if is_matrix or dtype != "fp32" or not long:  # without dots one precision is as good as another
            row, fixed = lookup(kernel.fn.__name__, kind, bits), {"PRECISION": precision} if is_matrix else {}
            for constants, late in forms:
                form = (kernel, dtype, {**fixed, **constants}, row, own, is_matrix, long or late, divisible)
                found.append(CompileCase(*form))
    return found
