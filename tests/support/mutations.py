"""Damage files at random, and watch what reading them does: for tests/long."""

import io
import json
import os
import signal
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import yaml

MARGIN = 200 * 2**20
SECONDS = 60  # a case that takes longer hangs; the slowest takes one
HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 0.5, 1.5, -0.0, 2**31, 2**53, 2**63, 2**64, 10**30, 10**400, 1e308, -1e308, 1e-320,
    float("nan"), float("inf"), "", "x", "1", "a\nb", "\ud7ff\u0000", "../..", "é" * 3, "x" * 10_000, [], {}, [[]],
    [None], {"": 0}, [0] * 1000, "cuda", "meta", "float16",
)  # fmt: skip
DEEP: Any = 0
for _ in range(60):
    DEEP = [DEEP]


# --- bytes ------------------------------------------------------------------------------------------------------


def scrambled(data: bytes, rng: Random) -> bytes:
    """Return bytes that differ from `data` as a broken disk, a cut transfer or a careless editor would have it."""
    size = max(1, len(data))
    a, b = sorted(rng.randrange(size) for _ in range(2))
    piece = data[a : min(b, a + rng.choice((1, 4, 16, 4096)))]
    end, noise = data[a + len(piece) :], rng.randbytes(len(data))
    bits = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        bits[rng.randrange(size)] ^= 1 << rng.randrange(8)
    return rng.choice(
        (
            bytes(bits), bytes(bits), bytes(bits), data[:a], data[: len(data) - rng.randrange(1, 20)], data[b:],
            data + noise[: rng.randrange(1, 40)], data[:a] + data[b:], data[:a] + piece + data[a:],
            data[:a] + bytes(len(piece)) + end, data[:a] + b"\xff" * len(piece) + end,
            data[:a] + noise[: len(piece)] + end,
            b"", noise, bytes(len(data)), b"\xef\xbb\xbf" + data, data + data, data[::-1],
        )
    )  # fmt: skip


# --- values -----------------------------------------------------------------------------------------------------


def changed(value: Any, rng: Random) -> Any:
    """Return a JSON value with one part replaced, removed, added or renamed."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        name = rng.choice(list(value))
        if rng.random() < 0.8:
            return {**value, name: changed(value[name], rng)}
        rest = {key: each for key, each in value.items() if key != name}
        return rng.choice((rest, {**rest, name + "x": value[name]}, {**value, "more": rng.choice(HOSTILE)}))
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        if rng.random() < 0.7:
            return [*value[:i], changed(value[i], rng), *value[i + 1 :]]
        return rng.choice((value[:i], value[:i] + value[i + 1 :], value + value[i:], value[::-1]))
    if isinstance(value, (int, float)) and rng.random() < 0.4:
        return rng.choice((value + 1, value - 1, -value, value * 2, value / 2, value * 1e300, str(value)))
    return rng.choice((*HOSTILE, DEEP))


def json_changed(data: bytes, rng: Random) -> bytes:
    """Damage a JSON file: its bytes, its values, or its text."""
    way = rng.random()
    if way < 0.3:
        return scrambled(data, rng)
    text = json.dumps(changed(json.loads(data), rng))
    if way > 0.9:
        a, b = rng.choice(
            (("{", '{"format": 1, '), ("[", "[" * 5000), (": ", ": 1e999, "), (", ", ",, "), ('"', "'"), ("1", "01"),
             ("0", "1" * 5000), ("0", "NaN"), ("[", "[1e400,"))
        )  # fmt: skip
        text = text.replace(a, b, 1)
    return text.encode("utf-8", "replace")


def yaml_changed(data: bytes, rng: Random) -> bytes:
    """Damage a YAML file: its bytes, its values, or its lines."""
    way = rng.random()
    if way < 0.25:
        return scrambled(data, rng)
    if way < 0.65:
        return yaml.safe_dump(changed(yaml.safe_load(data), rng), sort_keys=False).encode("utf-8", "replace")
    lines = data.decode().splitlines()
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    name = lines[i].partition(":")[0]
    bomb = (
        "a: &a ["
        + "x, " * 9
        + "x]\n"
        + "\n".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True))
    )
    lines[i] = rng.choice(
        (
            f"{name}: 010", f"{name}: 1:30", f"{name}: .inf", f"{name}: .nan", f"{name}: 1e999",
            f"{name}: &a {{b: *a}}", f"{name}: 2024-01-01",
            f"{name}: !!python/object/apply:os.system [true]", f"{name}: !!binary aGk=",
            f"{name}:", f"{name}: {'[' * 3000}", f"{name}: &a [*a]", f"<<: {{{name}: 1}}", f"{name}: [1, 2",
            f"\t{name}: 1", bomb, f"{name}: {'1' * 5000}", f"{name}: no", f"{name}: |\n  a\n  b", f"? {name}\n: 1",
            f"{lines[i]}\n{lines[i]}", f"{name}: '{lines[j]}'", f"{name}: 0x1f", f"{name}: 1_000",
            f"---\n{name}: 1\n---", "", lines[j], f" {lines[i]}",
        )
    )  # fmt: skip
    return "\n".join(lines).encode()


# --- tensors and arrays -----------------------------------------------------------------------------------------


def tensors_changed(data: bytes, rng: Random) -> bytes:
    """Damage a safetensors file: its bytes, its header, the header's length, or which tensor is which."""
    if rng.random() < 0.4:
        return scrambled(data, rng)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    way = rng.random()
    if way < 0.2:
        wrong = rng.choice((0, 1, length - 1, length + 1, len(data), 10**8, 10**9, 2**32, 2**62, 2**63, 2**64 - 1))
        return wrong.to_bytes(8, "little") + data[8:]
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    if way < 0.4:
        header[name], header[other] = header[other], header[name]
    elif way < 0.6:
        header[name]["shape"] = rng.choice(
            ([], [0], [2**62], [2**62, 4], [2**31, 2**31], [-1], [1] * 40, [0, 2**62], [1.5])
        )
    elif way < 0.7:
        header[name]["dtype"] = rng.choice(("F64", "I8", "BOOL", "F8_E4M3", "F4", "BF16", "U64", "C64", "", "O", 3))
    elif way < 0.8:
        header[name]["data_offsets"] = rng.choice(
            ([0, 2**63], [0, 10**12], [5, 1], [0, 0], [1, len(body)], [-4, 4], [])
        )
    else:
        header = changed(header, rng)
    packed = json.dumps(header).encode("utf-8", "replace")
    packed += b" " * (-len(packed) % 8)
    return len(packed).to_bytes(8, "little") + packed + body


def array_changed(data: bytes, rng: Random) -> bytes:
    """Damage an .npy file: its bytes, its version, or its header."""
    if rng.random() < 0.4:
        return scrambled(data, rng)
    length = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + length].decode("latin1").rstrip(), data[10 + length :]
    shape = header[header.index("(") : header.index(")") + 1]
    kind = header.split("'")[3]
    huge = (
        "(1000000000, 1000)", "(4611686018427387904, 4)", "(-1, 4)", "(0, 4611686018427387904)", "()", "(1,) * 9",
        "(True, 2)", "(2.0, 3)", "(" * 500, "(9" + "9" * 4000 + ",)", "(1,)", "(" + "1, " * 64 + ")",
        "(" + "1, " * 70 + ")",
    )  # fmt: skip
    kinds = (
        "|O",
        ">f4",
        ">i8",
        "<f16",
        "<f2",
        "<U5",
        "|S3",
        "|V8",
        "<i3",
        "<c16",
        "<M8[s]",
        "|b1",
        "x",
        "",
        "<U999999999",
    )
    header = rng.choice(
        (
            header.replace(shape, rng.choice(huge)), header.replace(shape, rng.choice(huge)),
            header.replace(kind, rng.choice(kinds)), header.replace(kind, rng.choice(kinds)),
            header.replace("'shape'", "'shap'"), header.replace("False", "True"), header[:-1], header + " 1", "1",
            header.replace("False", "__import__('os')"), header.replace(f"'{kind}'", "[('a', '<f4'), ('b', '|O')]"),
            "{" * 400, header.replace("{", "{'descr': '<f8', "),
        )
    )  # fmt: skip
    packed = header.encode("latin1") + b"\n"
    version, width = rng.choice(((1, 2), (1, 2), (1, 2), (2, 4), (3, 4), (9, 2)))
    said = rng.choice((len(packed), len(packed), len(packed), len(packed), 65535, 0, 2 ** (8 * width) - 1))
    return data[:6] + bytes((version, 0)) + said.to_bytes(width, "little") + packed + body


def archive_changed(data: bytes, rng: Random) -> bytes:
    """Damage an .npz file: its bytes, an array in it, its list of members, or how they are packed."""
    if rng.random() < 0.35:
        return scrambled(data, rng)
    if rng.random() < 0.01:
        return bomb()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    members[name] = array_changed(members[name], rng) if rng.random() < 0.7 else members[name]
    way = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", way) as archive:
        for each, content in members.items():
            archive.writestr(rng.choice((each, each, each, each, each[:-4], "../" + each, "x" + each)), content)
    packed = bytearray(buffer.getvalue())
    if rng.random() < 0.4:  # a field of the list of members: sizes, method, flags, where a member stands
        at = packed.index(b"PK\x01\x02") + rng.choice((6, 8, 10, 16, 20, 24, 28, 30, 34, 42))
        packed[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 2**16, 2**31, 2**32 - 1, rng.randrange(2**32))))
    return bytes(packed)


@cache
def bomb() -> bytes:
    """Return a small archive whose array of zeros would take 400 MB."""
    buffer = io.BytesIO()
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (400, 1000000), }".ljust(117) + "\n"
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("a.npy", "w") as member,
    ):
        member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
        for _ in range(400):
            member.write(bytes(1_000_000))
    return buffer.getvalue()


CHANGES: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": json_changed, ".yaml": yaml_changed, ".safetensors": tensors_changed, ".npy": array_changed,
    ".npz": archive_changed,
}  # fmt: skip


# --- cases ------------------------------------------------------------------------------------------------------


class Tally:
    """Runs cases, counts how they end, and keeps what must not happen.

    A case may refuse its file by ValueError or FileNotFoundError of one line, or accept it; it may neither raise
    anything else, nor take longer than `SECONDS`, nor ask for more memory than twice its file and 200 MB. Memory is
    what the process has mapped at most, touched or not, so a large allocation counts whatever becomes of it.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def case(self, name: str, n_bytes: int, act: Callable[[], str]) -> None:
        """Run one case; `act` returns in a word what an accepted file gave, or raises AssertionError."""
        held, peak = _mapped()
        try:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                outcome = act()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (ValueError, FileNotFoundError) as error:
            outcome = "refused"
            if "\n" in str(error) or not 10 < len(str(error)) < 3000:
                self.wrong.append(f"{name}: not one line: {error!r}")
        except Exception as error:
            outcome = "hung" if isinstance(error, _HungError) else "wrong"
            self.wrong.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        grown = _mapped()[1]
        if grown > peak and grown - held > 2 * n_bytes + MARGIN:
            self.wrong.append(f"{name}: {(grown - held) / 2**20:.0f} MB for {n_bytes:,} bytes")
            outcome = "too large"
        self.counts[outcome] += 1


class _HungError(Exception):
    pass


def _hung(signum: int, frame: FrameType | None) -> None:
    raise _HungError(f"after {SECONDS} s")


signal.signal(signal.SIGALRM, _hung)


def _mapped() -> tuple[int, int]:
    """Return the bytes that this process maps, and the most it ever has; zeros where the system does not tell."""
    status = Path("/proc/self/status")
    if not os.access(status, os.R_OK):
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmSize"].split()[0]) * 1024, int(fields["VmPeak"].split()[0]) * 1024
