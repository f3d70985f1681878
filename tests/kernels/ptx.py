"""Execute PTX, the code that Triton makes for sm_80, on numpy arrays, and find what a GPU does not tell.

`Kernel(text, shared)` translates a kernel once, `Kernel.launch(grid, arguments)` runs it on CPU tensors. All threads of
a program go in step, one instruction after another; where they branch apart, those that are furthest back go first.
Programs run one after another, in shuffled order. A `Fault` names the line of PTX, the line of the source, the
program and a thread for

* a global access outside the elements of the tensors that were passed, and any that is not aligned to its size;
* shared memory that is read before it was written, or while a cp.async that fills it has not been waited for;
* two warps of a program that touch the same bytes, and at least one writes, without a barrier between them, and two
  programs that do; only atomics may meet there, and equal values that are written twice;
* a barrier that only a part of the threads reaches, and an instruction of a whole warp that a part of it executes.

An instruction that is not known raises NotImplementedError with its line. Needs numpy and torch only. The order of the
memory's accesses is that of the program, so weak orderings are not explored; cp.async copies at once.
"""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch

from ptx_machine import ALL, FLOATS, SIGNED, UNSIGNED, Fault, GlobalMemory, Program, from_bf16

__all__ = ["Fault", "Kernel"]

# --- arithmetic: functions that the translated code calls -------------------------------------------------------


def sel(p, a, b):
    return np.where(p, a, b) if isinstance(p, np.ndarray) else (a if p else b)


def to_bf16(x):
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)[()]


def to_tf32(x):
    """Round to nearest, halves away from zero."""
    bits = x.view(np.uint32)
    return sel(np.isnan(x), bits, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def fma(a, b, c):
    wide = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    return wide.astype(np.float32 if a.dtype == np.float32 else a.dtype)


def quotient(a, b):
    """Divide as C does, toward zero; a division by zero gives all ones."""
    safe = sel(b == 0, np.ones_like(b), b)
    return sel(b == 0, ~np.zeros_like(a), (a - remainder(a, b)) // safe)


def remainder(a, b):
    return np.fmod(a, sel(b == 0, np.ones_like(b), b))


def to_integer(x, dtype, mode):
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x.astype(np.float64))
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return sel(x >= high, np.full_like(x, high, dtype), np.nan_to_num(np.clip(x, low, None)).astype(dtype))


POPULATION = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint32)


def popc(a):
    a = a.astype(np.uint64)
    return sum(POPULATION[(a >> np.uint64(s)) & np.uint64(0xFFFF)] for s in (0, 16, 32, 48)).astype(np.uint32)


def clz(a):
    return (a.dtype.itemsize * 8 - np.frexp(a.astype(np.longdouble))[1]).astype(np.uint32)


def bfe(a, position, length):
    width = a.dtype.itemsize * 8
    position, length = (np.asarray(v & np.uint32(0xFF)).astype(a.dtype) for v in (position, length))
    top = np.minimum(position + length, a.dtype.type(width))
    return sel(np.asarray(length == 0), a.dtype.type(0), (a << (width - top)) >> (width - top + position))


def bfi(a, b, position, length):
    mask = ((np.uint32(1) << length) - np.uint32(1)) << position
    return (b & ~mask) | ((a << position) & mask)


def prmt(a, b, selector):
    both, out = (b.astype(np.uint64) << np.uint64(32)) | a, np.uint32(0)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(0xF)
        byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)))) & np.uint64(0xFF)
        byte = sel(np.asarray(nibble >= 8), np.uint64(0xFF) * (byte >> np.uint64(7)), byte)
        out = out | (byte.astype(np.uint32) << np.uint32(8 * i))
    return out


def lop3(a, b, c, table):
    terms = [
        (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if int(table) >> i & 1
    ]
    out = np.zeros_like(a)
    for term in terms:
        out = out | term
    return out


def shf(low, high, shift, direction, mode):
    shift = (shift & np.uint32(31) if mode == "wrap" else np.minimum(shift, np.uint32(32))).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low
    return ((both << shift) >> np.uint64(32) if direction == "l" else both >> shift).astype(np.uint32)


def high_product(a, b):
    if a.dtype.itemsize < 8:
        wide = {np.int32: np.int64, np.uint32: np.uint64, np.int16: np.int32, np.uint16: np.uint32}[a.dtype.type]
        return (a.astype(wide) * b.astype(wide) >> (8 * a.dtype.itemsize)).astype(a.dtype)
    products = [(int(x) * int(y)) >> 64 for x, y in np.broadcast(np.atleast_1d(a), np.atleast_1d(b))]
    return np.array(products, a.dtype)


HELPERS = {f.__name__: f for f in (sel, from_bf16, to_bf16, to_tf32, fma, quotient, remainder, to_integer)}
HELPERS |= {f.__name__: f for f in (popc, clz, bfe, bfi, prmt, lop3, shf, high_product)}

# --- translation: one line of PTX to lines of Python ------------------------------------------------------------

# of operands a, b, c in the instruction's type
FORMULAS = {
    "add": "a + b", "sub": "a - b", "mul": "a * b", "mul.lo": "a * b", "mul.hi": "high_product(a, b)",
    "mad.lo": "a * b + c", "fma": "fma(a, b, c)", "and": "a & b", "or": "a | b", "xor": "a ^ b", "not": "~a",
    "neg": "-a", "abs": "np.abs(a)", "mov": "a", "cvta": "a", "popc": "popc(a)", "clz": "clz(a)", "bfe": "bfe(a, b, c)",
    "bfi": "bfi(a, b, c, d)", "prmt": "prmt(a, b, c)", "lop3": "lop3(a, b, c, d)", "min": "np.minimum(a, b)",
    "max": "np.maximum(a, b)", "selp": "sel(c, a, b)", "ex2": "np.exp2(a)", "lg2": "np.log2(a)", "rcp": "1 / a",
    "sqrt": "np.sqrt(a)", "rsqrt": "1 / np.sqrt(a)", "tanh": "np.tanh(a)", "sin": "np.sin(a)", "cos": "np.cos(a)",
    "copysign": "np.copysign(b, a)", "rem": "remainder(a, b)",
}  # fmt: skip
# operands whose type is not the instruction's: selectors and shifts are u32
OTHER_TYPES = {"selp": {2: "pred"}, "bfe": {1: "u32", 2: "u32"}, "bfi": {2: "u32", 3: "u32"}, "shl": {1: "u32"}}
OTHER_TYPES |= {"shr": {1: "u32"}}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">"}
COMPARISONS |= {"hs": ">="}
SPECIAL = {f"%{name}.{axis}": f"X.{name}[{i}]" for name in ("ctaid", "nctaid", "ntid") for i, axis in enumerate("xyz")}
SPECIAL |= {"%tid.x": "X.tid", "%tid.y": "ZERO", "%tid.z": "ZERO", "%laneid": "X.lane", "%warpid": "X.warp"}
TYPE = re.compile(r"^(pred|bf16x2|bf16|f16x2|tf32|[busf](8|16|32|64))$")


def width(kind: str) -> int:
    """Return how many bits a type has."""
    return {"bf16": 16, "bf16x2": 32, "f16x2": 32, "tf32": 32}.get(kind) or int(kind[1:])


def numpy_type(kind: str) -> Any:
    table = {"s": SIGNED, "f": FLOATS}.get("f" if kind == "tf32" else kind[0], UNSIGNED)
    return table[width(kind)]


class Line(NamedTuple):
    """One instruction: where it stands, its guard (a predicate, perhaps negated), its name's parts and operands."""

    number: int
    source: str
    guard: str
    parts: list[str]
    operands: list[str]


class Block:
    """Instructions without a branch into or out of them, and what comes after them."""

    def __init__(self) -> None:
        self.code: list[str] = []
        self.count, self.end, self.target, self.line = 0, "fall", 0, 0
        self.run: Any = None


class Kernel:
    """A kernel's translation. Raises NotImplementedError for an instruction that it does not know."""

    def __init__(self, text: str, shared: int):
        self.text, self.shared = text, shared
        self.name = re.search(r"\.entry\s+([\w$]+)", text)[1]
        self.threads = math.prod(int(n) for n in re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", text)[1].split(","))
        self.widths: dict[str, int] = {}  # of registers; 1 for predicates
        self.index: dict[str, int] = {}
        self.names: dict[str, Any] = {"np": np, "ZERO": np.uint32(0), **HELPERS}
        header, body = text[text.index(".entry") :].split("{", 1)
        parameters = re.findall(r"\.param\s+\.(\w+)[^,\n]*?([\w$]+),?\n", header)
        self.kinds, self.parameters = [k for k, _ in parameters], {name: i for i, (_, name) in enumerate(parameters)}
        self.blocks, self.sources = [Block()], {}
        self.synchronisations: list[int] = []  # lines of barriers and of waits for copies
        self.skipped: set[int] = set()  # those of them that are passed over, to see whether that is noticed
        self.unordered = False  # pass over all barriers, and look for what that breaks in global memory only
        self.passed: set[str] = set()  # and what was met there: "busy" where memory had been touched since a barrier
        lines = self._lines(body, text[: text.index(body)].count("\n"))
        self.uses = Counter(
            name
            for line in lines
            if isinstance(line, Line)
            for o in line.operands
            for name in re.findall(r"%?[\w.$]+", o)
        )
        labels: dict[str, int] = {}
        for line in lines:
            if isinstance(line, str):
                self._next()
                labels[line] = len(self.blocks) - 1
                continue
            self.sources[line.number] = line.source
            try:
                self._translate(line)
            except (KeyError, ValueError, IndexError, TypeError) as error:
                self._unknown(line, error)
        for block in self.blocks:
            block.target = labels.get(block.target, 0)
        code = []
        for i, block in enumerate(self.blocks):
            code += [f"def block_{i}(R, M, X):", *(f"    {own}" for own in block.code), "    return None", ""]
        exec(compile("\n".join(code), f"<{self.name}>", "exec"), self.names)
        for i, block in enumerate(self.blocks):
            block.run = self.names[f"block_{i}"]

    # reading

    def _lines(self, body: str, number: int) -> list[Any]:
        """Return the instructions of the body, and labels as text, up to its last brace."""
        found, depth, source = [], 1, ""
        for text in body.split("\n"):
            number += 1
            if text.lstrip().startswith(".loc"):
                source = text.partition("//")[2].strip()
                continue
            text = text.partition("//")[0].strip()
            label = re.match(r"^([\w$]+):(?!:)\s*(.*)$", text)
            if label:
                found.append(label[1])
                text = label[2]
            for statement in re.split(r";|(?<=^[{}])|^(?=[{}])", text):
                statement = statement.strip()
                if statement in ("{", "}"):
                    depth += 1 if statement == "{" else -1
                    if depth == 0:
                        return found
                elif statement.startswith(".reg"):
                    self._declare(statement)
                elif statement and not statement.startswith("."):
                    guard = re.match(r"^@(!?[%\w]+)\s+(.*)$", statement)
                    name, _, rest = (
                        (guard[2] if guard else statement).partition(" ") if " " in statement else (statement, "", "")
                    )
                    name, _, rest2 = (name + " " + rest).replace("\t", " ").strip().partition(" ")
                    operands = [o.strip() for o in re.split(r",(?![^{\[]*[}\]])", rest2) if o.strip()]
                    found.append(Line(number, source, guard[1] if guard else "", name.split("."), operands))
        raise ValueError(f"{self.name}: the body has no end")

    def _declare(self, statement: str) -> None:
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
        bits = 1 if kind == "pred" else int(kind[1:])
        for name in names.split(","):
            family = re.match(r"\s*([%\w]+)<(\d+)>", name)
            each = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [name.strip()]
            for own in each:
                self.widths[own] = bits
                self.index.setdefault(own, len(self.index))

    # operands

    def _constant(self, value: Any) -> str:
        name = f"C{len(self.names)}"
        self.names[name] = value
        return name

    def _value(self, operand: str, kind: str) -> str:
        """Return Python for an operand as a number of a type."""
        if operand.startswith("!"):
            return f"(~{self._value(operand[1:], kind)})"
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand not in self.widths:
            if not kind.endswith("x2") and kind != "bf16":
                return self._literal(operand, kind)
            own, bits = self._literal(operand, f"b{width(kind)}"), width(kind)
        else:
            own, bits = f"R[{self.index[operand]}]", self.widths[operand]
        if kind == "pred" or bits == 1:
            return own
        if kind in ("bf16", "bf16x2"):
            own = own if kind == "bf16" else f"X.full({own}).view(np.uint16)"
            return f"from_bf16({own})"
        if kind == "f16x2":
            return f"X.full({own}).view(np.float16)"
        if width(kind) < bits:
            own = f"{own}.astype(np.uint{width(kind)})"
        elif width(kind) > bits:
            raise ValueError(f"{operand} is too narrow for {kind}")
        return own if kind[0] in "bu" else f"{own}.view(np.{numpy_type(kind).__name__})"

    def _literal(self, text: str, kind: str) -> str:
        if text == "global_smem":
            return self._constant(numpy_type(kind)(0))
        if text in self.parameters:  # the address of a parameter: its number
            return self._constant(numpy_type(kind)(self.parameters[text]))
        if kind == "pred":
            return self._constant(np.bool_(int(text) != 0))
        if re.match(r"^0[fFdD][0-9a-fA-F]+$", text):
            bits = 32 if text[1] in "fF" else 64
            number = UNSIGNED[bits](int(text[2:], 16))
        elif re.match(r"^-?(0x[0-9a-fA-F]+|\d+)U?$", text):
            number = UNSIGNED[width(kind)](int(text.rstrip("U"), 0) & ALL[width(kind)])
        else:
            raise ValueError(f"operand {text}")
        return self._constant(number.view(numpy_type(kind)))

    def _put(self, line: Line, operand: str, kind: str, expression: str) -> list[str]:
        """Return Python that sets a register to a number of a type, where threads are active and the guard holds."""
        if operand == "_":
            return []
        place, bits = f"R[{self.index[operand]}]", self.widths[operand]
        if kind != "pred":
            if kind in ("bf16", "bf16x2"):
                expression = f"to_bf16({expression})"
            if kind.endswith("x2"):
                expression = f"({expression}).view(np.uint32)"
            elif width(kind) < bits:
                wide = ("" if kind[0] == "s" else "u") + f"int{bits}"
                narrow = f"({expression})" + (f".view(np.uint{width(kind)})" if kind[0] not in "sbu" else "")
                expression = f"{narrow}.astype(np.{wide}).view(np.uint{bits})"
            elif kind[0] not in "bu":
                expression = f"({expression}).view(np.uint{bits})"
        code = [f"v = {expression}"]
        guard = self._guard(line)
        return [*code, f"{place} = v if {guard} is None else sel({guard}, v, {place})"]

    def _guard(self, line: Line) -> str:
        return "G" if line.guard else "M"

    # instructions

    def _unknown(self, line: Line, why: Any = "") -> Any:
        text = self.text.split("\n")[line.number - 1].strip()
        raise NotImplementedError(f"{self.name}, line {line.number} of the PTX: {text} ({why})") from None

    def _next(self) -> None:
        if self.blocks[-1].count or self.blocks[-1].end != "fall":
            self.blocks.append(Block())

    def _translate(self, line: Line) -> None:
        name, parts, o, block = line.parts[0], line.parts, line.operands, self.blocks[-1]
        block.count += 1
        if line.guard:
            p = self._value(line.guard, "pred")
            if name not in ("bra", "ret", "exit"):
                block.code.append(f"G = {p} if M is None else {p} & M")
        if name in ("bra", "ret", "exit") or (name in ("bar", "barrier") and "warp" not in parts):
            self._end(line)
        elif name in ("membar", "fence", "bar", "barrier", "pragma", "griddepcontrol"):
            block.code.append("pass")
        elif name in ("ld", "st", "atom", "red", "cp", "ldmatrix", "createpolicy"):
            block.code += self._memory(line)
        elif name in ("shfl", "vote", "redux", "mma", "activemask"):
            block.code += self._warp(line)
        elif name == "cvt":
            block.code += self._convert(line)
        elif name == "setp":
            block.code += self._compare(line)
        elif name == "mov" and ("{" in o[0] or "{" in o[1]):
            block.code += self._pack(line)
        elif name == "div" and parts[-1][0] in "us":
            block.code += self._put(
                line, o[0], parts[-1], f"quotient({self._value(o[1], parts[-1])}, {self._value(o[2], parts[-1])})"
            )
        else:
            block.code += self._arithmetic(line)

    def _end(self, line: Line) -> None:
        block, name = self.blocks[-1], line.parts[0]
        block.line = line.number
        if name in ("bar", "barrier"):
            if line.guard or line.operands != ["0"] or not {"sync"} & set(line.parts):
                self._unknown(line)
            block.end = "bar"
            self.synchronisations.append(line.number)
        else:
            block.end = "bra" if name == "bra" else "ret"
            block.target = line.operands[0] if name == "bra" else ""
            if line.guard:
                block.code.append(f"return {self._value(line.guard, 'pred')}")
        self._next()

    def _arithmetic(self, line: Line) -> list[str]:
        parts, o = line.parts, line.operands
        name, kind = parts[0], parts[-1]
        if not TYPE.match(kind):
            self._unknown(line)
        others = OTHER_TYPES.get(name, {})
        if "wide" in parts:
            wide = kind[0] + str(2 * width(kind))
            a, b = (f"{self._value(x, kind)}.astype(np.{numpy_type(wide).__name__})" for x in o[1:3])
            formula = f"{a} * {b}" + (f" + {self._value(o[3], wide)}" if name == "mad" else "")
            return self._put(line, o[0], wide, formula)
        if name in ("shl", "shr"):
            a, b = self._value(o[1], kind), f"{self._value(o[2], 'u32')}.astype(np.{numpy_type(kind).__name__})"
            return self._put(line, o[0], kind, f"{a} {'<<' if name == 'shl' else '>>'} {b}")
        if name == "shf":
            values = ", ".join(self._value(x, "u32") for x in o[1:4])
            return self._put(line, o[0], "b32", f"shf({values}, {parts[1]!r}, {parts[2]!r})")
        values = {
            letter: self._value(x, others.get(i, kind))
            for i, (letter, x) in enumerate(zip("abcd", o[1:], strict=False))
        }
        key = ".".join(parts[:2]) if ".".join(parts[:2]) in FORMULAS else name
        formula = FORMULAS.get(key) or ("a / b" if name == "div" else self._unknown(line))
        if kind[0] in "fbt" and name in ("min", "max") and "NaN" not in parts and numpy_type(kind) in FLOATS.values():
            formula = f"np.f{name}(a, b)"
        if name in ("popc", "clz"):
            kind = "u32"
        return self._put(line, o[0], kind, re.sub(r"\b([abcd])\b", lambda m: values[m[1]], formula))

    def _compare(self, line: Line) -> list[str]:
        parts, o = line.parts, line.operands
        kind, how = parts[-1], parts[1]
        a, b = self._value(o[1], kind), self._value(o[2], kind)
        ordered = f"~(np.isnan({a}) | np.isnan({b}))"
        if how in ("num", "nan"):
            found = ordered if how == "num" else f"~{ordered}"
        elif how.endswith("u") and how[:-1] in COMPARISONS:
            found = f"(({a} {COMPARISONS[how[:-1]]} {b}) | ~{ordered})"
        else:
            found = f"({a} {COMPARISONS[how]} {b})"
            if how == "ne" and kind[0] == "f":
                found = f"({found} & {ordered})"
        signs = {"and": "&", "or": "|", "xor": "^"}
        joined = next((signs[p] for p in parts[2:-1] if p in signs), "")
        first, _, second = o[0].partition("|")
        end = f" {joined} {self._value(o[3], 'pred')}" if joined else ""
        code = self._put(line, second, "pred", f"~{found}{end}") if second else []
        return code + self._put(line, first, "pred", found + end)

    def _convert(self, line: Line) -> list[str]:
        parts, o = line.parts, line.operands
        to, start = parts[-2], parts[-1]
        a = self._value(o[1], start)
        if to in ("bf16x2", "f16x2"):
            b, rounded = self._value(o[2], start), "to_bf16" if to == "bf16x2" else "np.float16"
            high, low = (f"np.asarray({rounded}({v})).view(np.uint16).astype(np.uint32)" for v in (a, b))
            if "relu" in parts:
                self._unknown(line)
            return self._put(line, o[0], "b32", f"({high} << np.uint32(16)) | {low}")
        if to == "tf32":
            return self._put(line, o[0], "f32", f"to_tf32({a})")
        if to == "bf16":
            return self._put(line, o[0], "bf16", a)
        if to[0] in "us" and start[0] in "fb":
            mode = next(p for p in parts if p in ("rni", "rzi", "rmi", "rpi"))
            return self._put(line, o[0], to, f"to_integer({a}, np.{numpy_type(to).__name__}, {mode!r})")
        if "sat" in parts:
            a = f"np.clip({a}, 0, 1)" if to[0] == "f" else self._unknown(line)
        modes = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
        whole = next((modes[p] for p in parts if p in modes), None)
        a = f"{whole}({a})" if whole else a
        return self._put(line, o[0], to, f"{a}.astype(np.{numpy_type(to).__name__})")

    def _pack(self, line: Line) -> list[str]:
        bits = width(line.parts[-1])
        target, source = line.operands
        if "{" in target:
            names = self._list(target)
            step = bits // len(names)
            a, code = self._value(source, f"b{bits}"), []
            for i, name in enumerate(names):
                code += self._put(line, name, f"b{step}", f"({a} >> np.uint{bits}({i * step})).astype(np.uint{step})")
            return code
        names = self._list(source)
        step = bits // len(names)
        each = [
            f"({self._value(n, f'b{step}')}.astype(np.uint{bits}) << np.uint{bits}({i * step}))"
            for i, n in enumerate(names)
        ]
        return self._put(line, target, f"b{bits}", " | ".join(each))

    @staticmethod
    def _list(operand: str) -> list[str]:
        return [own.strip() for own in operand.strip("{} ").split(",")]

    def _address(self, operand: str, kind: str) -> str:
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        if base in self.parameters:
            raise ValueError("address of a parameter")
        a = self._value(base, kind)
        return f"{a} + {self._literal(offset, kind)}" if offset and offset != "0" else a

    def _memory(self, line: Line) -> list[str]:
        parts, o, guard = line.parts, line.operands, self._guard(line)
        name, kind = parts[0], parts[-1]
        if name == "createpolicy":
            return ["pass"]
        if name == "cp":
            if "commit_group" in parts:
                return [f"X.commit({guard}, {line.number})"]
            if "wait_group" in parts or "wait_all" in parts:
                self.synchronisations.append(line.number)
                return [f"X.wait({o[0] if o else 0}, {guard}, {line.number})"]
            if parts[1] != "async" or "bulk" in parts or "mbarrier" in parts:
                self._unknown(line)
            size = self._value(o[3], "u32") if len(o) > 3 else "None"
            to, start = self._address(o[0], "u32"), self._address(o[1], "u64")
            return [f"X.copy({to}, {start}, {int(o[2], 0)}, {size}, {guard}, {line.number})"]
        if name == "ldmatrix":
            count, names = int(parts[4 if parts[3].startswith("m8") else 3][1:]), self._list(o[0])
            code = [
                f"L = X.matrices({self._address(o[1], 'u32')}, {count}, {'trans' in parts}, {guard}, {line.number})"
            ]
            return code + [own for i, n in enumerate(names) for own in self._put(line, n, "b32", f"L[{i}]")]
        space = next(
            (p.partition("::")[0] for p in parts if p.partition("::")[0] in ("global", "shared", "param")), None
        )
        if space == "param":
            place = o[1].strip("[] ")
            kind, number = "b" + kind[1:] if kind[0] == "f" else kind, self.parameters.get(place)
            if number is None:  # an address that the program selected
                return self._put(
                    line, o[0], kind, f"X.selected({self._value(place, 'u64')}, np.{numpy_type(kind).__name__})"
                )
            return self._put(line, o[0], kind, f"X.parameters[{number}].astype(np.{numpy_type(kind).__name__})")
        if space is None:
            self._unknown(line, "no space")
        memory, size, address = f"X.{space}_memory", width(kind) // 8, "u64" if space == "global" else "u32"
        bits = f"b{width(kind)}"
        if name == "ld":
            names = self._list(o[0])
            code = [f"L = {memory}.load({self._address(o[1], address)}, {size}, {len(names)}, {guard}, {line.number})"]
            code.append("if L is not None:")
            puts = [
                own
                for i, n in enumerate(names)
                for own in self._put(
                    line,
                    n,
                    kind if kind[0] == "s" else bits,
                    f"L[{i}]" + (f".view(np.{numpy_type(kind).__name__})" if kind[0] == "s" else ""),
                )
            ]
            return code + [f"    {own}" for own in puts or ["pass"]]
        if name == "st":
            values = ", ".join(self._value(own, bits) for own in self._list(o[1]))
            return [f"{memory}.store({self._address(o[0], address)}, ({values},), {size}, {guard}, {line.number})"]
        operation = next(
            p for p in parts if p in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        )
        if kind not in ("u32", "s32", "b32", "u64", "s64", "b64", "f32", "f64", "f16"):
            self._unknown(line)
        at = 1 if name == "atom" else 0
        wanted = name == "atom" and o[0] != "_" and self.uses[o[0].strip("{} ")] > 1
        values = ", ".join(self._value(own.strip("{} "), kind) for own in o[at + 1 :])
        place = self._address(o[at], address)
        call = f"{memory}.atomic({operation!r}, {place}, ({values},), {size}, {wanted}, {guard}, {line.number})"
        return (
            [
                "L = " + call,
                "if L is not None:",
                *(f"    {own}" for own in self._put(line, o[0].strip("{} "), kind, "L")),
            ]
            if wanted
            else [call]
        )

    def _warp(self, line: Line) -> list[str]:
        parts, o, code = line.parts, line.operands, [f"X.whole({self._guard(line)}, {line.number})"]
        name, kind = parts[0], parts[-1]
        if name == "mma":
            shape, inner = parts[3], parts[7]
            if parts[6] != "f32" or parts[4:6] != ["row", "col"] or inner not in ("bf16", "f16", "tf32"):
                self._unknown(line)
            lists = ", ".join("[" + ", ".join(self._value(n, "b32") for n in self._list(x)) + "]" for x in o[1:3])
            sums = "[" + ", ".join(self._value(n, "f32") for n in self._list(o[3])) + "]"
            code.append(f"L = X.multiply({lists}, {sums}, {int(shape[shape.index('k') + 1 :])}, {inner!r})")
            return code + [own for i, n in enumerate(self._list(o[0])) for own in self._put(line, n, "f32", f"L[{i}]")]
        if name == "activemask":
            self._unknown(line)
        if o[-1] not in self.widths and self._literal(o[-1], "u32") and int(o[-1], 0) & ALL[32] != ALL[32]:
            self._unknown(line, "not all of a warp")
        if name == "shfl":
            first, _, valid = o[0].partition("|")
            code.append(f"L = X.shuffle({parts[2]!r}, {', '.join(self._value(x, 'u32') for x in o[1:4])})")
            code += self._put(line, valid, "pred", "L[1]") if valid else []
            return code + self._put(line, first, "b32", "L[0]")
        if name == "vote":
            return code + self._put(
                line,
                o[0],
                "pred" if kind == "pred" else "b32",
                f"X.vote({parts[2]!r}, {self._value(o[1], 'pred')}, {self._guard(line)})",
            )
        return code + self._put(line, o[0], kind, f"X.reduce({parts[2]!r}, {self._value(o[1], kind)})")

    # running

    def launch(self, grid: tuple[int, ...], arguments: list[Any], seed: int = 0) -> int:
        """Run every program on the arguments in the parameters' order; return the number of warps' instructions.

        Tensors are changed in place. Parameters without an argument are null, as Triton's scratch memory is.
        """
        memory = GlobalMemory([a for a in arguments if isinstance(a, torch.Tensor)])
        values = [memory.address(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        values += [0] * (len(self.kinds) - len(values))
        if len(values) != len(self.kinds):
            raise ValueError(f"{self.name} takes {len(self.kinds)} parameters, got {len(values)}")
        numbers = []
        for kind, value in zip(self.kinds, values, strict=True):
            if kind[0] == "f":
                numbers.append(np.array(value, numpy_type(kind)).view(UNSIGNED[width(kind)])[()])
            else:
                numbers.append(UNSIGNED[width(kind)](value & ALL[width(kind)]).view(numpy_type("s" + kind[1:])))
        sizes, done = (*grid, 1, 1)[:3], 0
        order = np.random.default_rng(seed).permutation(math.prod(sizes))
        with np.errstate(all="ignore"):
            for number in order.tolist():
                place = (number % sizes[0], number // sizes[0] % sizes[1], number // sizes[0] // sizes[1])
                done += Program(self, place, sizes, numbers, memory).run()
        memory.finish()
        return done
