"""The machine that `ptx.py` runs translated code on: memory that notices faults, and a program's threads in step."""

from typing import Any

import numpy as np
import torch

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATS = {16: np.float16, 32: np.float32, 64: np.float64}
ALL = {8: 0xFF, 16: 0xFFFF, 32: 0xFFFFFFFF, 64: 0xFFFFFFFFFFFFFFFF}
# what a register holds before it is set: not a number, in every type
GARBAGE = {1: np.True_, 16: np.uint16(0x7FDB), 32: np.uint32(0x7FDB7FDB), 64: np.uint64(0x7FFB7FDB7FDB7FDB)}
GAP = 40  # bits of an address inside one array's part of the address space
WARPS = 8  # the most warps of a program: their marks are the bits of a byte


class Fault(AssertionError):
    """The code does what it must not do, or what no two runs need to do alike."""


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


# --- memory -----------------------------------------------------------------------------------------------------


class Bytes:
    """An array's bytes, and a byte of marks for each: a bit per warp that read it, wrote it or changed it atomically.

    The marks are those since the last barrier; `seen` holds those of the whole program, `past` of programs before.
    """

    LAYERS = ("data", "known", "pending", "read", "written", "atomic")

    def __init__(self, name: str, data: np.ndarray, known: np.ndarray, fixed: bool):
        self.name, self.fixed, self.changed, self.filling = name, fixed, False, 0
        self.marked: dict[str, bool] = dict.fromkeys(Bytes.LAYERS[3:], False)
        blank = {layer: np.zeros(len(data), np.uint8) for layer in Bytes.LAYERS[2:]}
        self.layers = {"data": data, "known": known, **blank}
        self.views = {size: {k: v.view(UNSIGNED[8 * size]) for k, v in self.layers.items()} for size in (1, 2, 4, 8)}
        self.seen = {layer: np.zeros(len(data), np.uint8) for layer in self.marked} if fixed else {}
        self.past = {layer: np.zeros(len(data), np.uint8) for layer in self.marked} if fixed else {}

    def mark(self, layer: str, size: int, i: Any, marks: Any) -> None:
        view, self.marked[layer] = self.views[size][layer], True
        view[i] |= marks
        while ((lost := view[i] & marks) != marks).any():  # several warps meet in one place
            again = lost != marks
            i, marks = i[again], np.broadcast_to(marks, i.shape)[again]
            view[i] |= marks

    def barrier(self) -> None:
        for layer, is_marked in self.marked.items():
            if is_marked:
                if self.fixed:
                    self.seen[layer] |= self.layers[layer]
                self.layers[layer][:] = 0
                self.marked[layer] = False

    def end_program(self) -> int | None:
        """Return the place of a byte that this program and an earlier one touch, and one of them writes; else None."""
        self.barrier()
        seen, past = self.seen, self.past
        clash = (seen["written"] != 0) & ((past["written"] | past["read"] | past["atomic"]) != 0)
        clash |= (seen["read"] != 0) & ((past["written"] | past["atomic"]) != 0)
        clash |= (seen["atomic"] != 0) & ((past["written"] | past["read"]) != 0)
        for layer in seen:
            past[layer] |= seen[layer]
            seen[layer][:] = 0
        return int(clash.argmax()) if clash.any() else None


class GlobalMemory:
    """The storages of the tensors that a launch was given, each in a part of the address space of its own."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.storages: dict[int, tuple[Bytes, torch.Tensor, int]] = {}
        self.parts: list[Bytes] = []
        self.numbers: dict[int, int] = {}
        for n, tensor in enumerate(tensors):
            own = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            key, low = own.data_ptr(), own.data_ptr() % 256
            if key not in self.numbers:
                self.numbers[key] = len(self.parts)
                data = np.zeros(-(-(low + len(own)) // 16) * 16 + 16, np.uint8)
                data[low : low + len(own)] = own.numpy()
                self.parts.append(Bytes(f"tensor {n}", data, np.zeros_like(data), True))
                self.storages[self.numbers[key]] = (self.parts[-1], own, low)
            part = self.parts[self.numbers[key]]
            allowed = torch.zeros(len(own), dtype=torch.uint8)
            whole = len(own) // tensor.element_size() * tensor.element_size()
            if tensor.numel():
                same = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
                allowed[:whole].view(same).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(-1)
            part.layers["known"][low : low + len(own)] |= allowed.numpy()

    def address(self, tensor: torch.Tensor) -> int:
        own = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        place = own.data_ptr() % 256 + tensor.storage_offset() * tensor.element_size()
        return (self.numbers[own.data_ptr()] + 1 << GAP) + place

    def finish(self) -> None:
        """Copy what was written back to the tensors."""
        for part, own, low in self.storages.values():
            if part.changed:
                own.copy_(torch.from_numpy(part.layers["data"][low : low + len(own)].copy()))


class Access:
    """A program's loads and stores in one space, with the checks."""

    def __init__(self, program: "Program", parts: list[Bytes]):
        self.program, self.parts, self.touched = program, parts, set()

    def find(self, address: Any, guard: Any, line: int, size: int) -> list[tuple[Bytes, Any, Any]]:
        """Return, per array that is met: the array, the active threads' places in it, and the threads (None: all)."""
        if guard is not None and not isinstance(guard, np.ndarray):
            if not guard:
                return []
            guard = None
        a, threads = self.program.full(address), None
        if guard is not None and not guard.all():
            threads = np.flatnonzero(guard)
            a = a[threads]
            if not len(threads):
                return []
        off = a & a.dtype.type(size - 1)
        if off.any():
            self.fault(line, f"misaligned access of {size} bytes", off != 0, a, threads)
        if a.dtype == np.uint32:
            bad = a > np.uint32(max(0, self.program.kernel.shared - size))
            if bad.any() or self.program.kernel.shared < size:
                self.fault(line, "access outside shared memory", bad, a, threads)
            self.touched.add(0)
            return [(self.parts[0], a.astype(np.int64), threads)]
        number, found = a >> np.uint64(GAP), []
        for own in [number[0]] if (number == number[0]).all() else np.unique(number):
            chosen = number == own
            if not 1 <= own <= len(self.parts):
                self.fault(line, "access to no array", chosen, a, threads)
            part = self.parts[int(own) - 1]
            place = (a & np.uint64((1 << GAP) - 1)).astype(np.int64)
            bad = chosen & (place > len(part.layers["data"]) - size)
            if bad.any():
                self.fault(line, f"access outside {part.name}", bad, place, threads)
            self.touched.add(int(own) - 1)
            if chosen.all():
                return [(part, place, threads)]
            lanes = np.flatnonzero(chosen)
            found.append((part, place[lanes], lanes if threads is None else threads[lanes]))
        return found

    def fault(self, line: int, what: str, bad: Any, places: Any, threads: Any) -> Any:
        bad = bad if bad.ndim == 1 else bad.any(0)
        first = int(np.flatnonzero(bad)[0])
        thread = first if threads is None else int(threads[first])
        self.program.fault(line, f"{what}, at byte {int(places[first]):#x}", thread)

    def others(self, part: Bytes, layer: str, size: int, i: Any, marks: Any) -> Any:
        """Return where warps other than the thread's own left a mark since the last barrier; None if nowhere."""
        if not part.marked[layer]:
            return None
        found = (part.views[size][layer][i] & ~marks) != 0
        return found if found.any() else None

    def check(
        self, part: Bytes, layers: tuple[str, ...], size: int, i: Any, marks: Any, line: int, threads: Any
    ) -> None:
        verbs = {"read": "reads", "written": "writes", "atomic": "changes"}
        for layer in layers if part.fixed or not self.program.kernel.unordered else ():
            bad = self.others(part, layer, size, i, marks)
            if bad is not None:
                what = f"{part.name}: another warp {verbs[layer]} the same bytes with no barrier between"
                self.fault(line, what, bad, size * (i[0] if i.ndim == 2 else i), threads)

    def elements(self, place: Any, size: int, count: int) -> Any:
        i = place // size
        return i if count == 1 else i + np.arange(count)[:, None]

    def load(self, address: Any, size: int, count: int, guard: Any, line: int) -> Any:
        """Return `count` arrays over all threads, or None if no thread is active."""
        program, out = self.program, None
        for part, place, threads in self.find(address, guard, line, size * count):
            i, view = self.elements(place, size, count), part.views[size]
            bad = view["known"][i] != view["known"].dtype.type(ALL[8 * size])
            if bad.any():
                if part.fixed:
                    what = f"load outside {part.name}"
                else:
                    is_filling = (view["pending"][i] != 0)[bad].any()
                    what = (
                        "shared memory read before its cp.async was waited for"
                        if is_filling
                        else "shared memory read before it was written"
                    )
                self.fault(line, what, bad, place, threads)
            marks = program.marks[size] if threads is None else program.marks[size][threads]
            self.check(part, ("written", "atomic"), size, i, marks, line, threads)
            part.mark("read", size, i, marks)
            values = view["data"][i]
            values = values[None] if count == 1 else values
            if threads is None:
                return values
            if out is None:
                out = np.zeros((count, program.n), values.dtype)
            out[:, threads] = values
        return out

    def store(
        self, address: Any, values: tuple[Any, ...], size: int, guard: Any, line: int, filling: bool = False
    ) -> None:
        program, count = self.program, len(values)
        for part, place, threads in self.find(address, guard, line, size * count):
            i, view = self.elements(place, size, count), part.views[size]
            full = view["known"].dtype.type(ALL[8 * size])
            new = np.stack([program.full(v) for v in values]) if count > 1 else program.full(values[0])
            new = new if threads is None else new[..., threads]
            marks = program.marks[size] if threads is None else program.marks[size][threads]
            if part.fixed:
                bad = view["known"][i] != full
                if bad.any():
                    self.fault(line, f"store outside {part.name}", bad, place, threads)
            elif part.filling:
                bad = view["pending"][i] != 0
                if bad.any():
                    self.fault(line, "store where a cp.async has not been waited for", bad, place, threads)
            self.check(part, ("read", "atomic"), size, i, marks, line, threads)
            others = self.others(part, "written", size, i, marks)
            if others is not None and (filling or ((view["data"][i] != new) & others).any()):
                self.check(part, ("written",), size, i, marks, line, threads)
            view["data"][i], part.changed = new, True
            bad = view["data"][i] != new
            if bad.any():
                self.fault(line, "two threads store different values at once", bad, place, threads)
            if filling:
                view["known"][i], view["pending"][i] = 0, full
                part.filling += 1
                program.group.append((part, size, i, marks))
            else:
                if not part.fixed:
                    view["known"][i] = full
                part.mark("written", size, i, marks)

    def atomic(
        self, name: str, address: Any, values: tuple[Any, ...], size: int, wanted: bool, guard: Any, line: int
    ) -> Any:
        """Change memory thread by thread; return what stood there before, where that is wanted."""
        program, out = self.program, None
        for part, place, threads in self.find(address, guard, line, size):
            i, view = place // size, part.views[size]
            bad = view["known"][i] != view["known"].dtype.type(ALL[8 * size])
            if bad.any():
                self.fault(
                    line,
                    f"atomic outside {part.name}" if part.fixed else "atomic on shared memory that was not written",
                    bad,
                    place,
                    threads,
                )
            marks = program.marks[size] if threads is None else program.marks[size][threads]
            self.check(part, ("read", "written"), size, i, marks, line, threads)
            part.mark("atomic", size, i, marks)
            part.changed = True
            own = [program.full(v) if threads is None else program.full(v)[threads] for v in values]
            data = view["data"].view(own[0].dtype)
            functions = {
                "add": np.add,
                "min": np.minimum,
                "max": np.maximum,
                "and": np.bitwise_and,
                "or": np.bitwise_or,
            }
            functions |= {"xor": np.bitwise_xor}
            if not wanted and name in functions:
                functions[name].at(data, i, own[0])
                continue
            out = np.zeros(program.n, view["data"].dtype) if out is None else out
            for j, at in enumerate(i.tolist()):
                before = data[at]
                out[j if threads is None else threads[j]] = before.view(out.dtype)
                if name == "cas":
                    data[at] = own[1][j] if before == own[0][j] else before
                elif name == "exch":
                    data[at] = own[0][j]
                elif name in functions:
                    data[at] = functions[name](before, own[0][j])
                else:
                    raise NotImplementedError(f"{program.kernel.name}, line {line}: atomic {name}")
        return out.view(values[0].dtype) if out is not None else None


# --- a program --------------------------------------------------------------------------------------------------


class Program:
    """All threads of one program, in step: `run` returns how many instructions its warps executed."""

    def __init__(self, kernel: Any, place: Any, grid: Any, parameters: list[Any], memory: GlobalMemory):
        self.kernel, self.n, self.place = kernel, kernel.threads, place
        if self.n % 32 or self.n > 32 * WARPS:
            raise NotImplementedError(f"{kernel.name}: {self.n} threads, expected whole warps, at most {WARPS}")
        self.tid = np.arange(self.n, dtype=np.uint32)
        self.lane, self.warp = self.tid & np.uint32(31), self.tid >> np.uint32(5)
        self.ctaid, self.nctaid = ([np.uint32(v) for v in own] for own in (place, grid))
        self.ntid, self.parameters = [np.uint32(self.n), np.uint32(1), np.uint32(1)], parameters
        ones = {size: ALL[8 * size] // 255 for size in (1, 2, 4, 8)}
        self.marks = {
            s: np.array([(1 << w) * one for w in self.warp.tolist()], UNSIGNED[8 * s]) for s, one in ones.items()
        }
        size = -(-kernel.shared // 16) * 16
        garbage = np.random.default_rng(size).integers(256, size=size, dtype=np.uint8)
        self.shared = Bytes("shared memory", garbage, np.zeros(size, np.uint8), False)
        self.shared_memory, self.global_memory = Access(self, [self.shared]), Access(self, memory.parts)
        self.group: list[Any] = []  # copies since the last commit
        self.groups: list[list[Any]] = []

    def full(self, value: Any) -> Any:
        return value if getattr(value, "ndim", 0) else np.full(self.n, value)

    def selected(self, numbers: Any, dtype: Any) -> Any:
        """Return the parameters at addresses that were computed."""
        return np.stack([own.astype(dtype) for own in self.parameters])[numbers]

    def fault(self, line: int, what: str, thread: int | None = None) -> Any:
        text = self.kernel.text.split("\n")[line - 1].strip()
        who = f"program {self.place}" + ("" if thread is None else f", thread {thread}")
        raise Fault(
            f"{self.kernel.name}, line {line} of the PTX ({self.kernel.sources.get(line, '')}): {text}: {what}; {who}"
        )

    def run(self) -> int:
        blocks, registers, done = self.kernel.blocks, [GARBAGE[bits] for bits in self.kernel.widths.values()], 0
        live: dict[int, Any] = {0: None}  # block -> the threads that are about to execute it; None: all
        waiting: dict[int, Any] = {}  # the same for those at the barrier that ends a block

        def add(to: dict[int, Any], number: int, mask: Any) -> None:
            joined = None if mask is None else mask | to[number] if number in to else mask
            if joined is None or joined.all():
                to[number] = None
            elif joined.any():
                to[number] = joined

        while live:
            number = min(live)
            mask, block = live.pop(number), blocks[number]
            if number + 1 == len(blocks) and not block.count:
                continue
            taken = block.run(registers, mask, self)
            if block.line in self.kernel.skipped:
                parts = [self.shared, *(self.global_memory.parts[i] for i in self.global_memory.touched)]
                self.kernel.passed.add("busy" if any(any(p.marked.values()) for p in parts) else "idle")
            done += block.count * (self.n // 32 if mask is None else int(mask.reshape(-1, 32).any(1).sum()))
            if block.end == "bar" and block.line not in self.kernel.skipped and not self.kernel.unordered:
                add(waiting, number, mask)
                if waiting.get(number, ...) is None:
                    waiting.pop(number)
                    self.barrier()
                    live[number + 1] = None
            elif taken is None or not isinstance(taken, np.ndarray):
                if taken is None or taken:
                    if block.end in ("fall", "bar"):
                        add(live, number + 1, mask)
                    elif block.end == "bra":
                        add(live, block.target, mask)
                else:
                    add(live, number + 1, mask)
            else:
                if block.end == "bra":
                    add(live, block.target, taken if mask is None else taken & mask)
                add(live, number + 1, ~taken if mask is None else ~taken & mask)
        if waiting:
            block, mask = blocks[min(waiting)], waiting[min(waiting)]
            self.fault(block.line, "a barrier that only a part of the threads reaches", int(np.flatnonzero(~mask)[0]))
        for part in (self.global_memory.parts[i] for i in self.global_memory.touched):
            byte = part.end_program()
            if byte is not None:
                raise Fault(
                    f"{self.kernel.name}: two programs, one of them {self.place}, touch byte {byte} of {part.name}, "
                    "and one writes"
                )
        return done

    def barrier(self) -> None:
        self.shared.barrier()
        for i in self.global_memory.touched:
            self.global_memory.parts[i].barrier()

    # asynchronous copies

    def copy(self, to: Any, start: Any, size: int, given: Any, guard: Any, line: int) -> None:
        step = min(size, 8)
        values: Any = np.zeros((size // step, self.n), UNSIGNED[8 * step])
        given = self.full(np.uint32(size) if given is None else given)
        own = given != 0
        if ((given != size) & own).any():
            raise NotImplementedError(f"{self.kernel.name}, line {line}: a copy of a part")
        loaded = self.global_memory.load(start, step, size // step, own if guard is None else own & guard, line)
        values = values if loaded is None else np.where(own, loaded, 0).astype(values.dtype)
        self.shared_memory.store(to, tuple(values), step, guard, line, filling=True)

    def commit(self, guard: Any, line: int) -> None:
        self._all(guard, line)
        self.groups.append(self.group)
        self.group = []

    def wait(self, left: int, guard: Any, line: int) -> None:
        self._all(guard, line)
        if line in self.kernel.skipped:
            return
        while len(self.groups) > left:
            for part, size, i, marks in self.groups.pop(0):
                view = part.views[size]
                view["known"][i], view["pending"][i] = view["known"].dtype.type(ALL[8 * size]), 0
                part.mark("written", size, i, marks)
                part.filling -= 1

    def _all(self, guard: Any, line: int) -> None:
        if guard is not None and not np.all(guard):
            raise NotImplementedError(f"{self.kernel.name}, line {line}: groups of a part of the threads")

    # whole warps

    def whole(self, guard: Any, line: int) -> None:
        if isinstance(guard, np.ndarray):
            lanes = guard.reshape(-1, 32)
            bad = lanes.any(1) & ~lanes.all(1)
            if bad.any():
                self.fault(line, "executed by a part of a warp", 32 * int(np.flatnonzero(bad)[0]))

    def matrices(self, address: Any, count: int, is_transposed: bool, guard: Any, line: int) -> Any:
        self.whole(guard, line)
        lanes = None if count == 4 else self.lane < 8 * count
        lanes = guard if lanes is None else lanes if guard is None else lanes & guard
        loaded = self.shared_memory.load(address, 4, 4, lanes, line)
        rows = np.ascontiguousarray(loaded.T).reshape(-1, 32, 4)[:, : 8 * count].reshape(-1, count, 8, 4)
        if is_transposed:
            halves = np.ascontiguousarray(rows).view(np.uint16).swapaxes(-1, -2)
            rows = np.ascontiguousarray(halves).view(np.uint32)
        return rows.reshape(-1, count, 32).swapaxes(0, 1).reshape(count, self.n)

    def multiply(self, a: list[Any], b: list[Any], c: list[Any], depth: int, kind: str) -> Any:
        """Multiply warps' tiles a [16, depth] and b [depth, 8] and add c [16, 8], in float32."""
        each = 1 if kind == "tf32" else 2  # elements in a register

        def numbers(registers: list[Any]) -> Any:
            bits = np.stack([self.full(r) for r in registers])  # [register, thread]
            if kind == "tf32":
                return (bits & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
            halves = bits.view(np.uint16).reshape(*bits.shape, 2)
            return from_bf16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)

        halves = depth // (4 * each)
        left = numbers(a).reshape(halves, 2, -1, 8, 4, each).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, depth)
        right = numbers(b).reshape(halves, -1, 8, 4, each).transpose(1, 0, 3, 4, 2).reshape(-1, depth, 8)
        sums = np.stack([self.full(r) for r in c]).reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
        out = (left @ right + sums).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
        return out.reshape(4, self.n)

    def shuffle(self, mode: str, a: Any, b: Any, c: Any) -> tuple[Any, Any]:
        lane, a = self.lane.astype(np.int64), self.full(a)
        b, c = np.asarray(b).astype(np.int64) & 31, np.asarray(c).astype(np.int64)
        segment, clamp = c >> 8 & 31, c & 31
        last, first = (lane & segment) | (clamp & ~segment), lane & segment
        at = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[mode]
        valid = at >= last if mode == "up" else at <= last
        return a[np.where(valid, at, lane) + 32 * self.warp.astype(np.int64)], valid

    def vote(self, mode: str, p: Any, guard: Any) -> Any:
        lanes = self.full(p).reshape(-1, 32)
        if mode == "ballot":
            return np.repeat((lanes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32), 32)
        return np.repeat({"any": lanes.any, "all": lanes.all}[mode](1), 32)

    def reduce(self, mode: str, a: Any) -> Any:
        function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}[
            mode
        ]
        return np.repeat(function.reduce(self.full(a).reshape(-1, 32), axis=1, dtype=a.dtype), 32)
