"""Compile every form of the kernels for GPUs that are not here; read registers, shared memory and spills.

    python -m bench.gpu.forms [KIND ..] [--module NAME ..] [--long] [--write]

Prints a JSON list, one entry per form and kind: registers, spilled registers (bytes on NVIDIA), shared memory in bytes,
the matrix instructions found, and the operations that take reshapes which may be reordered apart. A form that spills or
does not fit is named, and the exit status is 1. With --write the figures go into bench/results/forms.json instead,
beside those of other kinds and modules; the site shows them as a table. All forms of all kinds take about an hour on
one core, and what Triton's cache holds is not compiled again.
`--counting N` reads the forms of the projection that count a histogram, for all T and R up to N, compiled to TTGIR
only (no registers then).
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure.environment import RESULTS

FILE = RESULTS / "forms.json"
# bytes of shared memory that one program may have
SHARED = {
    **{"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10},
    **{"sm_120": 99 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10, "gfx1100": 64 << 10},
}

MATRIX = {
    "sm": re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)"),
    "gfx": re.compile(r"\b(v_mfma|v_smfmac|v_wmma)"),
}


def target_of(kind: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if kind.startswith("sm_"):
        return GPUTarget("cuda", int(kind[3:]), 32)
    return GPUTarget("hip", kind, 64 if kind.startswith("gfx9") else 32)


def source_of(case: Any) -> Any:
    """Return the source of one case, as a launch with packed, 16-divisible tensors and sizes would compile it."""
    from triton.compiler import ASTSource

    constants = {**case.constants, **case.row.blocks}
    signature, attributes = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = case.type_of(name)
        if case.is_divisible(name):
            paths = [(i, j) for j in range(len(signature[name]))] if isinstance(signature[name], tuple) else [(i,)]
            attributes |= {path: [["tt.divisibility", 16]] for path in paths}
    unknown = set(constants) - set(case.kernel.arg_names)
    assert not unknown, f"{case.name()}: the kernel has no {unknown}"
    return ASTSource(case.kernel, signature, constants, attributes)


def compile_case(case: Any, kind: str) -> dict[str, Any]:
    """Compile one case to an object and read it."""
    import triton

    compiled = triton.compile(source_of(case), target=target_of(kind), options=case.row.options(kind))
    read = read_amd if kind.startswith("gfx") else read_nvidia
    is_matrix = case.is_matrix and not (kind == "gfx1100" and case.dtype == "fp32")  # it has no such instruction
    found = {"name": case.name(), "kind": kind, "is_matrix": is_matrix, "shared": compiled.metadata.shared}
    return {**found, "reordered": reordered_apart(compiled.asm["ttgir"]), **read(compiled)}


def faults(case: dict[str, Any]) -> list[str]:
    """Return what is wrong with a compiled form."""
    found = []
    if case["spills"]:
        found.append(f"spills {case['spills']} (registers {case['registers']})")
    if case["shared"] > SHARED[case["kind"]]:
        found.append(f"{case['shared']} bytes of shared memory")
    if case["reordered"]:
        found.append(f"reshapes reordered apart before {', '.join(case['reordered'])}")
    if case["is_matrix"] and not case["matrix"]:
        found.append("no matrix instruction")
    return found


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


# --- the table ----------------------------------------------------------------------------------------------------


def write(found: Sequence[dict[str, Any]]) -> Path:
    """Put figures into the committed file; forms that are no more leave it."""
    import triton

    from l3d.storage.files import replace_text
    from l3d_kernels.kernels.shared.launch_table import KINDS

    forms: dict[str, dict[str, list[int]]] = {}
    if FILE.exists():
        forms = json.loads(FILE.read_text(encoding="utf-8"))["forms"]
    for case in found:
        forms.setdefault(case["name"], {})[case["kind"]] = [case["registers"], case["shared"], case["spills"]]
    kept: dict[str, dict[str, list[int]]] = {}
    for kind in KINDS:
        for name in (case.name() for case in cases_of(kind, [], long=True)):
            if kind in forms.get(name, {}):
                kept.setdefault(name, {})[kind] = forms[name][kind]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
    return replace_text(FILE, f'{{\n "triton": "{triton.__version__}",\n "forms": {{\n{lines}\n }}\n}}\n')


def page() -> str:
    """Write the site's page: a table per kernel, a row per form, a column per kind of GPU."""
    results = json.loads(FILE.read_text(encoding="utf-8"))
    kinds = [kind for kind in SHARED if any(kind in cells for cells in results["forms"].values())]
    limits = ", ".join(f"{kind} {SHARED[kind] >> 10}" for kind in kinds)
    parts = [
        "# The kernels as compiled code",
        f"Registers of a thread / KiB of shared memory of a program, and spills where there are any: every form in "
        f"which a kernel is launched, compiled ahead of time by triton {results['triton']} at sizes that 16 divides. "
        f"No GPU was needed, and none has run them. `python -m bench.gpu.forms --long --write` makes these figures. A "
        f"program may have, in KiB: {limits}.",
    ]
    rows: dict[str, list[str]] = {}
    for name, cells in results["forms"].items():
        kernel, _, form = name.partition("-")
        label = form.replace("-", ", ").replace("_ptr=*", " ").replace("PRECISION=", "")
        columns = (cell(*cells[kind]) if kind in cells else "" for kind in kinds)
        rows.setdefault(kernel, []).append(f"| {label} | {' | '.join(columns)} |")
    for kernel, own in rows.items():
        head = f"| form | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}"
        parts.append("\n".join([f"## {kernel}\n", head, *own]))
    return "\n\n".join(parts) + "\n"


def cell(registers: int, shared: int, spills: int) -> str:
    """Write a form's figures.

    >>> cell(168, 49152, 0), cell(255, 512, 16)
    ('168 / 48', '255 / 0.5, spills 16')
    """
    return f"{registers} / {shared / 1024:.3g}" + (f", spills {spills}" if spills else "")


# --- the command --------------------------------------------------------------------------------------------------


def cases_of(kind: str, modules: Sequence[str], long: bool) -> list[Any]:
    """Return the forms of some modules of `l3d_kernels.kernels`, or all; `long`: also those in the long test only."""
    from l3d_kernels.kernels import MODULES

    chosen = [importlib.import_module(f"l3d_kernels.kernels.{name}") for name in modules] or MODULES
    return [case for module in chosen for case in module.compile_cases(kind) if long or not case.long]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what the command line names; return the exit status."""
    os.environ.pop("TRITON_INTERPRET", None)  # read when triton is imported
    from l3d_kernels.kernels.shared.launch_table import KINDS

    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.forms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="*", help=f"of {', '.join(KINDS)}; all where none is named")
    parser.add_argument(
        "--module", nargs="*", default=[], help="of l3d_kernels.kernels, such as project.fused; default: all"
    )
    parser.add_argument("--long", action="store_true", help="also the forms left to `make test-kernels`")
    parser.add_argument("--write", action="store_true", help="put the figures into bench/results/forms.json")
    parser.add_argument("--counting", type=int, metavar="N", help="read TTGIR for all T and R up to N instead")
    options = parser.parse_args(arguments)
    if unknown := set(options.kind) - set(KINDS):
        parser.error(f"expected some of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    found, bad = [], 0
    for kind in options.kind or KINDS:
        if options.counting:
            from l3d_kernels.kernels.project.topk import counting_cases

            cases = [case for case in counting_cases(kind, options.counting) if options.long or not case.long]
            found += [{"name": case.name(), "reordered": reordered_apart(ttgir_of(case, kind))} for case in cases]
            continue
        own = [compile_case(case, kind) for case in cases_of(kind, options.module, options.long)]
        for case in own:
            if what := faults(case):
                bad += 1
                print(f"FAILED {kind} {case['name']}: {', '.join(what)}", file=sys.stderr, flush=True)
        found += own
        if options.write:
            print(f"{kind}: {len(own)} forms, written: {write(own)}", flush=True)
    if not options.write:
        print(json.dumps(found, indent=1))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
