"""Compile kernels for GPUs that are not here, and read the objects: `python aot.py KIND MODULE ... [--long]`.

Prints a JSON list, one entry per case: name, registers, spilled registers, shared memory, and the matrix
instructions found. A program of its own, since Triton's interpreter must be off when the kernels are imported.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MATRIX = {"sm": re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)"), "gfx": re.compile(r"\b(v_mfma|v_smfmac)")}


def target_of(kind: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", kind, 64) if kind.startswith("gfx") else GPUTarget("cuda", int(kind[3:]), 32)


def compile_case(case: Any, kind: str) -> dict[str, Any]:
    """Compile one case as a launch with packed, 16-divisible tensors and sizes would."""
    import triton
    from triton.compiler import ASTSource

    constants = {**case.constants, **case.row.blocks}
    signature, attributes = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = case.types.get(name, f"*{case.dtype}" if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or name in case.divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    unknown = set(constants) - set(case.kernel.arg_names)
    assert not unknown, f"{case.name()}: the kernel has no {unknown}"
    source = ASTSource(case.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target_of(kind), options=case.row.options(kind))
    read = read_amd if kind.startswith("gfx") else read_nvidia
    return {"name": case.name(), "is_matrix": case.is_matrix, "shared": compiled.metadata.shared, **read(compiled)}


def read_nvidia(compiled: Any) -> dict[str, Any]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = sorted(set(MATRIX["sm"].findall(compiled.asm["ptx"])))
    return {"registers": numbers["REG"], "spills": numbers["STACK"] + numbers["LOCAL"], "matrix": instructions}


def read_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    numbers = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
    return {
        "registers": numbers["vgpr_count"],
        "spills": numbers["vgpr_spill_count"],
        "matrix": sorted(set(MATRIX["gfx"].findall(text))),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind")
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--long", action="store_true", help="also the cases left to `make test-kernels`")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import importlib

    modules = [importlib.import_module(f"l3d_kernels.kernels.{name}") for name in arguments.modules]
    cases = [case for module in modules for case in module.compile_cases(arguments.kind)]
    chosen = [case for case in cases if arguments.long or not case.long]
    print(json.dumps([compile_case(case, arguments.kind) for case in chosen], indent=1))


if __name__ == "__main__":
    main()
