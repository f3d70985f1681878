"""List the forms of a kernel that are compiled ahead of time, for GPUs that are not here.

A test compiles each form and looks for register spills, shared memory beyond the limit and missing matrix instructions.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from l3d_kernels.kernels.shared.common import float32_precision
from l3d_kernels.kernels.shared.launch_table import Launch, lookup

# The types, by name, of pointers that are not of the call's dtype and of numbers that are no sizes: a name has one type
# in all kernels.
INDICES = (
    "codes column_offsets column_order columns earlier histogram index indices key limit offsets order previous ranks "
    "row_offsets rows sample segments sorted starts state state_out stop tile totals"
)
# kept wider than 16 bits
SUMS = "correction d_a decay factor gram highest logits mean moves parts scale size sums total"
Type = str | tuple[str, ...]
TYPES: dict[str, Type] = {f"{name}_ptr": "*i64" for name in INDICES.split()}
TYPES |= {f"{name}_ptr": "*fp32" for name in SUMS.split()}
TYPES |= {"row_counts_ptr": "*i32", "column_counts_ptr": "*i32"}
TYPES |= {"numbers": ("fp32",) * 4, "pairs": ("*i64",) * 3, "part": ("i32",) * 4}
TENSORS = 4  # of a launch that serves several: its arguments named .._ptrs and .._of are tuples

Forms = Sequence[tuple[dict[str, Any], bool]]  # pairs of (constants, only in the long test)


class CompileCase(NamedTuple):
    """One kernel with types and constants to compile ahead of time, without a device."""

    kernel: Any  # a @triton.jit function
    dtype: str  # of every pointer not named in `types`: "bf16", "fp16", "fp32"
    constants: dict[str, Any]  # constexprs beside the blocks; None for a pointer that is not passed
    row: Launch
    types: dict[str, Type]  # other arguments' types, such as {"index_ptr": "*i64"}; sizes are i32
    long: bool = False  # compiled by `make test-kernels` only
    divisible: tuple[str, ...] = ("I", "O", "D", "A", "B")  # sizes taken to be multiples of 16

    @property
    def is_matrix(self) -> bool:
        """Return whether the kernel must compile to matrix instructions."""
        return "PRECISION" in self.kernel.arg_names

    def type_of(self, name: str) -> Type:
        """Return the type of an argument that is no constant; a tuple for one that has a member for each tensor."""
        single = self.types.get(name, f"*{self.dtype}" if name.endswith(("_ptr", "_ptrs")) else "i32")
        return (single,) * TENSORS if isinstance(single, str) and name.endswith(("_ptrs", "_of")) else single

    def is_divisible(self, name: str) -> bool:
        """Return whether an argument is taken to be a multiple of 16: pointers and `divisible` sizes."""
        return name.endswith(("_ptr", "_ptrs")) or name.removesuffix("_of") in self.divisible

    def name(self) -> str:
        """Return a name that tells the kernel's cases apart: kernel, dtype, constants and unusual types."""
        flags = [f"{key}={value}" for key, value in self.constants.items()]
        types = [f"{key}={value}" for key, value in self.types.items() if value[0] == "*" and value != "*i64"]
        return "-".join([self.kernel.fn.__name__, self.dtype, *flags, *types])


def types_of(kernel: Any, **others: Type) -> dict[str, Type]:
    """Return the types of a kernel's arguments that are not the usual; `others` beside those of TYPES."""
    names = {name.replace("_ptrs", "_ptr"): name for name in kernel.arg_names}
    return {names[known]: own for known, own in (TYPES | others).items() if known in names}


def cases_of_kernel(
    kernel: Any,
    kind: str,
    forms: Forms | Callable[[Launch, int], Forms] = (({}, False),),
    row_form: str = "",
    divisible: tuple[str, ...] = CompileCase._field_defaults["divisible"],
    **types: Type,
) -> list[CompileCase]:
    """List a kernel's cases for every dtype, and for every precision of a matrix kernel.

    forms: pairs of (constants, only in the long test), or a function from the launch row and an element's bytes to
    them. row_form: as in `row_for`. types: pointers' types beside those of TYPES.
    """
    found, is_matrix = [], "PRECISION" in kernel.arg_names
    exact, fast = float32_precision(True, kind), float32_precision(False, kind)
    dtypes = [("bf16", "ieee", False), ("fp16", "ieee", True), ("fp32", exact, False)]
    if is_matrix and fast != exact:  # without dots one precision is like another
        dtypes.append(("fp32", fast, True))
    for dtype, precision, late in dtypes:
        row = lookup(kernel.fn.__name__ + row_form, kind, dtype[-2:])
        for constants, long in forms(row, int(dtype[-2:]) // 8) if callable(forms) else forms:
            own = {"PRECISION": precision, **constants} if is_matrix else constants
            found.append(CompileCase(kernel, dtype, own, row, types_of(kernel, **types), late or long, divisible))
    return found
