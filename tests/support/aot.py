"""Compile kernels for GPUs that are not here, and read the objects: `python aot.py KIND MODULE ... [--long]`.

Prints a JSON list, one entry per case: name, registers, spilled registers, shared memory, the matrix instructions
found, and the operations that take reshapes which may be reordered apart. `--counting N` instead reads the forms of the
projection that count a histogram, for all T and R up to N, compiled to TTGIR only (no registers then). A program of its
own, since Triton's interpreter must be off when the kernels are imported.
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


def source_of(case: Any) -> Any:
    """Return the source of one case, as a launch with packed, 16-divisible tensors and sizes would compile it."""
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
    return ASTSource(case.kernel, signature, constants, attributes)


def compile_case(case: Any, kind: str) -> dict[str, Any]:
    """Compile one case to an object and read it."""
    import triton

    compiled = triton.compile(source_of(case), target=target_of(kind), options=case.row.options(kind))
    read = read_amd if kind.startswith("gfx") else read_nvidia
    found = {"name": case.name(), "is_matrix": case.is_matrix, "shared": compiled.metadata.shared}
    return {**found, "reordered": reordered_apart(compiled.asm["ttgir"]), **read(compiled)}


def ttgir_of(case: Any, kind: str) -> str:
    """Compile one case as far as TTGIR, where layouts are decided."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    target, source = target_of(kind), source_of(case)
    backend = make_backend(target)
    options = backend.parse_options({**case.row.options(kind), **source.parse_options()})
    context, stages = ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, source.language)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    metadata = {"target": target, **options.__dict__}
    for stage in ("ttir", "ttgir"):
        module = stages[stage](module, metadata)
    return str(module)


def reordered_apart(ttgir: str) -> list[str]:
    """Return the operations that take two reshapes which may reorder their elements, each from another layout.

    Elements that belong together (a tile and its mask) would then meet others.
    """
    found, layouts = [], {}
    for line in ttgir.splitlines():
        reshape = re.match(r"\s*(%[\w#]+) = tt\.reshape .* allow_reorder .*: tensor<[^#]*(#\w+)", line)
        if reshape:
            layouts[reshape[1]] = reshape[2]
            continue
        operation = re.match(r"\s*%[\w#:]+ = (?:\")?([\w.]+)", line)
        taken = {layouts[name] for name in re.findall(r"%[\w#]+", line.partition(" = ")[2]) if name in layouts}
        if operation and len(taken) > 1:
            found.append(f"{operation[1]} of {' and '.join(sorted(taken))}")
    return found


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
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--counting", type=int, metavar="N", help="read TTGIR for all T and R up to N instead")
    parser.add_argument("--long", action="store_true", help="also the cases left to `make test-kernels`")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import importlib

    if arguments.counting:
        from l3d_kernels.kernels.project.topk import counting_cases

        cases = [case for case in counting_cases(arguments.kind, arguments.counting) if arguments.long or not case.long]
        print(
            json.dumps([{"name": c.name(), "reordered": reordered_apart(ttgir_of(c, arguments.kind))} for c in cases])
        )
        return
    modules = [importlib.import_module(f"l3d_kernels.kernels.{name}") for name in arguments.modules]
    cases = [case for module in modules for case in module.compile_cases(arguments.kind)]
    chosen = [case for case in cases if arguments.long or not case.long]
    print(json.dumps([compile_case(case, arguments.kind) for case in chosen], indent=1))


if __name__ == "__main__":
    main()
