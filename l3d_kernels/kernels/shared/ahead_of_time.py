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


DTYPES = (("bf16", "16"), ("fp16", "16"), ("fp32", "32"))  # (pointer type, size class)


def compile_dtypes(kind: str) -> list[tuple[str, str, str, bool]]:
    """Return every form of a matrix kernel: (pointer type, size class, precision, only in the long test)."""
    exact, fast = float32_precision(True, kind), float32_precision(False, kind)
    return [
        ("bf16", "16", "ieee", False),
        ("fp16", "16", "ieee", True),
        ("fp32", "32", exact, False),
        ("fp32", "32", fast, True),
    ]


def types_of(kernel: Any, types: Mapping[str, str]) -> dict[str, str]:
    """Return those of the types that are of the kernel's arguments."""
    return {name: own for name, own in types.items() if name in kernel.arg_names}


def matrix_cases(
    kernel: Any,
    kind: str,
    forms: Iterable[tuple[dict[str, Any], bool]] = (({}, False),),
    types: Mapping[str, str] | None = None,
    divisible: tuple[str, ...] = ("I", "O"),
) -> list[CompileCase]:
    """List a matrix kernel's cases for every dtype and precision: forms are (constants, only in the long test)."""
    own = types_of(kernel, types or {})
    return [
        CompileCase(
            kernel,
            dtype,
            {"PRECISION": precision, **constants},
            lookup(kernel.fn.__name__, kind, bits),
            own,
            long=long or late,
            divisible=divisible,
        )
        for dtype, bits, precision, long in compile_dtypes(kind)
        for constants, late in forms
    ]


def other_cases(
    kernel: Any,
    kind: str,
    forms: Iterable[tuple[dict[str, Any], bool]] = (({}, False),),
    types: Mapping[str, str] | None = None,
    divisible: tuple[str, ...] = (),
) -> list[CompileCase]:
    """List the cases of a kernel without dots for every dtype: forms are (constants, only in the long test)."""
    own = types_of(kernel, types or {})
    return [
        CompileCase(
            kernel,
            dtype,
            constants,
            lookup(kernel.fn.__name__, kind, bits),
            own,
            False,
            dtype == "fp16" or late,
            divisible,
        )
        for dtype, bits in DTYPES
        for constants, late in forms
    ]
