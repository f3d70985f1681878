"""The machine that executes PTX: instructions give what the PTX manual says, and each kind of fault is found."""

import numpy as np
import pytest
import torch

from ptx import Fault, Kernel
from ptx_machine import GlobalMemory, Program

TEXT = """
.version 8.0
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry probe(
	.param .u64 .ptr .global .align 1 probe_param_0,
	.param .u32 probe_param_1
)
.reqntid 64
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<20>;
	ld.param.b64 %rd1, [probe_param_0];
	ld.param.b32 %r3, [probe_param_1];
	mov.u32 %r1, %tid.x;
	mad.wide.u32 %rd3, %r1, 4, %rd1;
	shl.b32 %r2, %r1, 2;
	CODE
	st.global.b32 [%rd3], %r5;
	ret;
}
"""
TID = np.arange(64, dtype=np.int64)


def run(code: str, n: int = 64, programs: int = 1, shared: int = 256) -> np.ndarray:
    """Return what each thread left in %r5; the second parameter is -7."""
    out = torch.zeros(n, dtype=torch.int32)
    Kernel(TEXT.replace("CODE", code), shared).launch((programs,), [out, -7])
    return out.numpy().astype(np.int64)


def floats(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.int32).astype(np.int64)


INSTRUCTIONS: dict[str, np.ndarray] = {
    "sub.s32 %r5, %r3, %r1;": -7 - TID,
    "div.s32 %r5, %r3, 2;": np.full(64, -3),
    "rem.s32 %r5, %r3, 2;": np.full(64, -1),
    "div.u32 %r5, %r1, 5;": TID // 5,
    "shr.s32 %r5, %r3, 1;": np.full(64, -4),
    "shl.b32 %r5, %r1, 32;": np.zeros(64),
    "mul.hi.s32 %r5, %r3, 0x40000000;": np.full(64, -2),
    "mad.lo.s32 %r5, %r1, %r3, 1;": 1 - 7 * TID,
    "bfe.u32 %r5, %r1, 2, 3;": TID >> 2 & 7,
    "bfe.s32 %r5, %r1, 2, 2;": ((TID >> 2 & 3) ^ 2) - 2,
    "popc.b32 %r5, %r1;": np.array([bin(i).count("1") for i in range(64)]),
    "clz.b32 %r5, %r1;": np.array([32 - i.bit_length() for i in range(64)]),
    "prmt.b32 %r5, %r1, 0x04030201, 0x7640;": 0x04030000 | TID & 0xFF | (1 << 8),
    "lop3.b32 %r5, %r1, 12, 10, 0x96;": TID ^ 12 ^ 10,
    "setp.lt.s32 %p1, %r1, 9; selp.b32 %r5, 1, %r1, %p1;": np.where(TID < 9, 1, TID),
    "mov.b32 %r5, 3; setp.gt.u32 %p1, %r1, 40; @%p1 mov.b32 %r5, 4;": np.where(TID > 40, 4, 3),
    "cvt.u16.u32 %rs1, %r3; cvt.s32.s16 %r5, %rs1;": np.full(64, -7),
    "cvt.rn.f32.s32 %r6, %r3; cvt.rzi.s32.f32 %r5, %r6;": np.full(64, -7),
    "cvt.rn.f32.u32 %r4, %r1; fma.rn.f32 %r5, %r4, %r4, 0f3F800000;": floats(TID * TID + 1.0),
    "cvt.rn.f32.u32 %r4, %r1; ex2.approx.f32 %r5, %r4;": floats(2.0**TID),
    "cvt.rna.tf32.f32 %r5, 0f3F801000;": np.full(64, 0x3F802000),
    "cvt.rn.bf16x2.f32 %r5, 0f3F808000, 0f3F818000;": np.full(64, 0x3F803F82),
    "mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r5, {%rs2, %rs1};": np.full(64, 0xFFF9FFFF - 2**32),
    "shfl.sync.bfly.b32 %r5, %r1, 5, 31, -1;": TID ^ 5,
    "shfl.sync.up.b32 %r5, %r1, 1, 0, -1;": np.where(TID % 32 == 0, TID, TID - 1),
    "shfl.sync.down.b32 %r5, %r1, 2, 0x181f, -1;": np.where(TID % 8 > 5, TID, TID + 2),
    "shfl.sync.idx.b32 %r5, %r1, 3, 31, -1;": TID // 32 * 32 + 3,
    "setp.eq.b32 %p1, %r1, 33; vote.sync.ballot.b32 %r5, %p1, -1;": np.where(TID < 32, 0, 2),
    "redux.sync.add.s32 %r5, %r1, -1;": np.where(TID < 32, 496, 1520),
    "st.shared.b32 [%r2], %r1; bar.sync 0; xor.b32 %r6, %r2, 252; ld.shared.b32 %r5, [%r6];": 63 - TID,
    "st.shared.b32 [%r2], 0; bar.sync 0; atom.shared.add.u32 %r5, [0], 2;": 2 * TID,
}


@pytest.mark.parametrize("code", INSTRUCTIONS)
def test_instructions(code: str) -> None:
    """One instruction, or a few, for 64 threads."""
    np.testing.assert_array_equal(run(code), INSTRUCTIONS[code])


def test_branches_meet_again() -> None:
    """Threads that branch apart run alone, loop for their own number of rounds, and meet at a barrier."""
    code = """mov.b32 %r5, 0; and.b32 %r6, %r1, 3;
$A: setp.eq.b32 %p1, %r6, 0;
	@%p1 bra $B;
	add.s32 %r5, %r5, 10; sub.s32 %r6, %r6, 1;
	bra.uni $A;
$B: bar.sync 0;"""
    np.testing.assert_array_equal(run(code), TID % 4 * 10)


@pytest.mark.parametrize("kind, depth", [("bf16", 16), ("f16", 16), ("tf32", 8), ("bf16", 8)])
def test_tiles_are_multiplied(kind: str, depth: int) -> None:
    """mma.sync multiplies what its fragments hold, as the manual lays them out over a warp's threads."""
    kernel = Kernel(TEXT.replace("CODE", ""), 0)
    program = Program(kernel, (0, 0, 0), (1, 1, 1), [], GlobalMemory([]))
    generator = np.random.default_rng(0)
    a, b = generator.integers(-8, 8, (2, 16, depth)), generator.integers(-8, 8, (2, depth, 8))
    lane, warp, each = TID % 32, TID // 32, 1 if kind == "tf32" else 2
    group, own = lane // 4, lane % 4 * each

    def register(values: list[np.ndarray]) -> np.ndarray:
        if kind == "tf32":
            return values[0].astype(np.float32).view(np.uint32)
        bits = [
            v.astype(np.float32).view(np.uint32) >> 16
            if kind == "bf16"
            else v.astype(np.float16).view(np.uint16).astype(np.uint32)
            for v in values
        ]
        return bits[0] | bits[1] << 16

    columns = [4 * each * half for half in range(depth // (4 * each))]
    lefts = [register([a[warp, group + row, own + c + e] for e in range(each)]) for c in columns for row in (0, 8)]
    rights = [register([b[warp, own + c + e, group] for e in range(each)]) for c in columns]
    start = [np.full(64, np.float32(i)) for i in range(4)]
    out, expected = program.multiply(lefts, rights, start, depth, kind), a @ b
    for i, (row, column) in enumerate([(0, 0), (0, 1), (8, 0), (8, 1)]):
        np.testing.assert_array_equal(out[i], expected[warp, group + row, lane % 4 * 2 + column] + i)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_matrices_are_loaded(is_transposed: bool) -> None:
    """ldmatrix gives thread t the elements 2t and 2t+1 of each 8x8 matrix, or of its transpose."""
    code = f"""st.shared.v2.b32 [%r9], {{%r7, %r8}}; bar.sync 0;
	ldmatrix.sync.aligned.m8n8.x1.{"trans." if is_transposed else ""}shared.b16 {{%r5}}, [%r10];"""
    # 64 threads of 8 bytes make four matrices of 128 bytes; thread t writes halves 4t .. 4t+3
    code = (
        "shl.b32 %r9, %r1, 3; mul.lo.s32 %r7, %r2, 65537; add.s32 %r7, %r7, 65536; "
        "add.s32 %r8, %r7, 131074; and.b32 %r11, %r1, 7; shl.b32 %r10, %r11, 4;" + code
    )
    halves = np.arange(64).reshape(8, 8)
    pairs = (halves.T if is_transposed else halves).reshape(32, 2)
    np.testing.assert_array_equal(run(code, shared=512), np.tile(pairs[:, 0] + (pairs[:, 1] << 16), 2))


FAULTS = {
    "outside": ("ld.global.b32 %r5, [%rd3+4];", "load|access outside tensor 0"),
    "misaligned": ("ld.global.b32 %r5, [%rd3+2];", "misaligned access of 4 bytes"),
    "no array": ("ld.global.b32 %r5, [100];", "access to no array"),
    "outside shared memory": ("st.shared.b32 [%r2+4], %r1; mov.b32 %r5, 0;", "outside shared memory"),
    "not written": ("ld.shared.b32 %r5, [%r2];", "shared memory read before it was written"),
    "no barrier": ("st.shared.b32 [%r2], %r1; xor.b32 %r6, %r2, 252; ld.shared.b32 %r5, [%r6];", "another warp writes"),
    "read, then written": (
        "st.shared.b32 [%r2], %r1; bar.sync 0; xor.b32 %r6, %r2, 252; "
        "ld.shared.b32 %r5, [%r6]; st.shared.b32 [%r2], 9;",
        "another warp reads",
    ),
    "written twice": ("and.b32 %r6, %r2, 127; st.shared.b32 [%r6], %r1; mov.b32 %r5, 0;", "different values at once"),
    "not all atomic": (
        "st.shared.b32 [%r2], 0; bar.sync 0; atom.shared.add.u32 %r6, [0], 1; ld.shared.b32 %r5, [0];",
        "another warp changes",
    ),
    "global memory": (
        "st.global.b32 [%rd3], %r1; xor.b32 %r6, %r2, 252; "
        "cvt.u64.u32 %rd4, %r6; add.s64 %rd4, %rd4, %rd1; ld.global.b32 %r5, [%rd4];",
        "another warp writes",
    ),
    "a part at a barrier": (
        "mov.b32 %r5, 0; setp.lt.u32 %p1, %r1, 32; @%p1 bra $C;\n bar.sync 0;\n$C:",
        "a barrier that only a part of the threads reaches",
    ),
    "a part of a warp": (
        "mov.b32 %r5, 0; setp.lt.u32 %p1, %r1, 3; @%p1 bra $C;\n shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;\n$C:",
        "executed by a part of a warp",
    ),
    "a copy not waited for": (
        "cp.async.ca.shared.global [%r2], [%rd3], 4; cp.async.commit_group; bar.sync 0; ld.shared.b32 %r5, [%r2];",
        "before its cp.async was waited for",
    ),
    "a copy waited for by its warp alone": (
        "cp.async.ca.shared.global [%r2], [%rd3], 4; cp.async.commit_group; cp.async.wait_group 0; "
        "xor.b32 %r6, %r2, 252; ld.shared.b32 %r5, [%r6];",
        "another warp writes",
    ),
    "a store into a copy": (
        "cp.async.ca.shared.global [%r2], [%rd3], 4; st.shared.b32 [%r2], 1; mov.b32 %r5, 0;",
        "store where a cp.async has not been waited for",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str) -> None:
    """Each kind of fault raises, with the line and what is wrong."""
    code, message = FAULTS[name]
    with pytest.raises(Fault, match=message):
        run(code)


def test_a_copy_that_is_waited_for() -> None:
    """A wait and a barrier after it are enough; a copy of zero bytes fills with zeros and reads nothing."""
    code = (
        "mov.b32 %r6, 0; cp.async.ca.shared.global [%r2], [%rd3+4096], 4, %r6; cp.async.commit_group; "
        "cp.async.wait_group 0; bar.sync 0;"
    )
    np.testing.assert_array_equal(run(code + "xor.b32 %r6, %r2, 252; ld.shared.b32 %r5, [%r6];"), 0)


def test_two_programs_in_one_place() -> None:
    """Two programs that store to the same bytes are found, also where they store the same; atomics are let be."""
    with pytest.raises(Fault, match="two programs, one of them"):
        run("mov.b32 %r5, 1;", programs=2)
    atomic = TEXT.replace("CODE", "").replace("st.global.b32 [%rd3], %r5", "red.global.add.u32 [%rd3], %r1")
    out = torch.zeros(64, dtype=torch.int32)
    assert Kernel(atomic, 0).launch((3,), [out, 0]) == 3 * 2 * 7
    np.testing.assert_array_equal(out.numpy(), 3 * TID)


def test_gaps_of_a_tensor_are_not_its_elements() -> None:
    """What lies between a view's elements is outside it."""
    out = torch.zeros(64, 2, dtype=torch.int32)
    with pytest.raises(Fault, match="store outside tensor 0"):
        Kernel(TEXT.replace("CODE", "mov.b32 %r5, 1;"), 0).launch((1,), [out[:, 0], 0])


def test_unknown_instructions_are_named() -> None:
    """What is not known raises when the kernel is read, with its line."""
    with pytest.raises(NotImplementedError, match=r"probe, line 20 of the PTX: wgmma.fence.sync.aligned;"):
        run("wgmma.fence.sync.aligned;")
