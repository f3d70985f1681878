"""What the ops refuse: shapes, dtypes and devices that do not fit each other, and backends that cannot run."""

import pytest
import torch

import l3d_kernels as lk
from l3d_kernels import cpu, registry

from op_cases import FITTING, OPS, Inputs, calls, integers, zeros

REFUSED: list[tuple[str, Inputs, str]] = [
    ("project", {"dy": zeros(5, 4, 7)}, r"dy: expected shape \[S, 4, O\] with S a multiple of 3, got \[5, 4, 7\]"),
    ("project", {"dy": zeros(6, 3, 7)}, r"dy: expected shape \[S, 4, O\] with S a multiple of 3, got \[6, 3, 7\]"),
    ("project", {"dy": zeros(6, 4)}, r"dy: expected shape \[S, 4, O\] .* got \[6, 4\]"),
    ("project", {"x": zeros(3, 4)}, r"x: expected shape \[B, T, I\], or int64 \[B, T\], got torch.float32 \[3, 4\]"),
    ("project", {"x": integers(3, 4, 5)}, r"x: expected shape .* got torch.int64 \[3, 4, 5\]"),
    ("project", {"x": zeros(3, 4, 6)}, r"right: expected shape \[K, R, 6\] to match x, got \[2, 2, 5\]"),
    ("project", {"left": zeros(2, 2, 8)}, r"left: expected shape \[K, R, 7\] to match dy, got \[2, 2, 8\]"),
    ("project", {"left": zeros(2, 7)}, r"left: expected shape \[K, R, O\], got \[2, 7\]"),
    ("project", {"right": zeros(2, 3, 5)}, r"right: expected shape \[2, 2, I\] to match left, got \[2, 3, 5\]"),
    ("project", {"right": zeros(3, 2, 5)}, r"right: expected shape \[2, 2, I\] to match left, got \[3, 2, 5\]"),
    (
        "project_tiled",
        {"dy": zeros(6, 3, 7)},
        r"dy: expected shape \[S, 4, O\] with S a multiple of 3, got \[6, 3, 7\]",
    ),
    ("project_tiled", {"x": integers(3, 4)}, r"x: expected a floating dtype, got torch.int64"),
    ("project_tiled", {"right": zeros(2, 2, 4)}, r"right: expected shape \[K, R, 5\] to match x, got \[2, 2, 4\]"),
    ("project_at", {"dy": zeros(5, 4, 7)}, r"dy: expected shape \[S, 4, O\] with S a multiple of 3, got \[5, 4, 7\]"),
    ("project_at", {"dy": zeros(9, 4, 7)}, r"kept: expected coefficients of shape \[9, 2\], got \[6, 2\]"),
    ("project_at", {"left": zeros(4, 2, 7), "right": zeros(4, 2, 5)}, r"kept: expected .* \[6, 4\], got \[6, 2\]"),
    ("project_at", {"right": zeros(2, 2, 4)}, r"right: expected shape \[K, R, 5\] to match x, got \[2, 2, 4\]"),
    ("project_dense", {"grad": zeros(6, 5, 7)}, r"grad: expected shape \[S, 7, 5\] .* got \[6, 5, 7\]"),
    ("project_dense", {"grad": zeros(6, 35)}, r"grad: expected shape \[S, 7, 5\] .* got \[6, 35\]"),
    ("project_dense", {"left": zeros(7)}, r"left: expected shape \[K, R, O\], got \[7\]"),
    ("gram", {"right": zeros(2, 5)}, r"right: expected shape \[2, 2, I\] to match left, got \[2, 5\]"),
    ("gram_energy", {"left": zeros(3, 2, 7), "right": zeros(3, 2, 5)}, r"kept: expected .* \[6, 3\], got \[6, 2\]"),
    ("gram_energy_coactive", {"left": zeros(1, 2, 7), "right": zeros(1, 2, 5)}, r"kept: .* \[6, 1\], got \[6, 2\]"),
    ("gram_energy_coactive", {"left": [], "right": []}, r"left: expected at least 1 tensors, got 0"),
    ("gram_energy_coactive", {"left": [zeros(2, 2, 7)], "right": []}, r"right: expected 1 tensors, got 0"),
    ("gram_energy_coactive", {"left": [zeros(2, 2, 7)]}, r"left: expected a tensor, got list"),
    *(
        ("gram_energy_coactive", {"left": [zeros(2, 2, 7), left], "right": [zeros(2, 2, 5), right]}, message)
        for left, right, message in [
            (zeros(2, 3, 4), zeros(2, 2, 4), r"right\[1\]: expected shape \[2, 3, I\] to match left, got \[2, 2, 4\]"),
            (zeros(3, 2, 4), zeros(3, 2, 4), r"left\[1\]: expected a first axis of 2 as in left\[0\], got 3"),
            (zeros(2, 2, 4).half(), zeros(2, 2, 4).half(), r"left\[1\]: expected dtype torch.float32 .* torch.float16"),
        ]
    ),
    ("reconstruct", {"left": zeros(1, 2, 7), "right": zeros(1, 2, 5)}, r"kept: .* \[6, 1\], got \[6, 2\]"),
    ("squared_residual_norm", {"grad": zeros(4, 7, 5)}, r"kept: expected .* \[4, 2\], got \[6, 2\]"),
    ("squared_residual_norm", {"grad": zeros(6, 7, 6)}, r"grad: expected shape \[S, 7, 5\] .* got \[6, 7, 6\]"),
    ("squared_gradient_norm", {"dy": zeros(5, 4, 7)}, r"dy: expected shape \[S, 4, O\] with S a multiple of 3, got"),
    ("squared_gradient_norm", {"x": zeros(3)}, r"x: expected shape"),
    (
        "project",
        {"left": zeros(2, 2, 7).double()},
        r"left: expected dtype torch.float32 to match dy, got torch.float64",
    ),
    ("project_at", {"right": zeros(2, 2, 5).half()}, r"right: expected dtype torch.float32 .* got torch.float16"),
    ("project_tiled", {"x": zeros(3, 4, 5).to("meta")}, r"x: expected device cpu to match dy, got meta"),
    ("project_dense", {"left": zeros(2, 2, 7).double()}, r"left: expected dtype torch.float32 to match grad, got"),
]


@pytest.mark.parametrize("name, changed, message", REFUSED)
def test_shapes_that_do_not_belong_together_are_refused(name: str, changed: Inputs, message: str) -> None:
    """A wrong shape raises one line: the argument, the expected shape, the one it got."""
    OPS[name].run(lk, FITTING)
    with pytest.raises(ValueError, match=message) as error:
        OPS[name].run(lk, FITTING | changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((integers(3), zeros(3), zeros(4, 2)), r"indices: expected shape \[A, k\], got \[3\]"),
        (
            (integers(3, 2), zeros(3, 2), zeros(4, 2), integers(4)),
            r"indices: expected shape \[N\] with row_offsets, got",
        ),
        ((integers(3, 2), zeros(3, 1), zeros(4, 2)), r"values: expected shape \[3, 2\] to match indices, got \[3, 1\]"),
        ((integers(3, 2), zeros(3, 2), zeros(4)), r"weight: expected shape \[L, D\], got \[4\]"),
    ],
)
def test_sparse_decode_refuses_shapes_that_do_not_belong_together(arguments: tuple, message: str) -> None:
    """A wrong shape raises one line: the argument, the expected shape, the one it got."""
    with pytest.raises(ValueError, match=message):
        lk.sparse_decode(*arguments)


@pytest.mark.parametrize("name", calls())
def test_a_backend_that_cannot_be_had_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="triton" raises with the reason, no kernel or no GPU tensor; an unknown name lists those there are."""
    run = calls()[name]
    assert torch.equal(run(), run(backend="torch"))
    with pytest.raises(ValueError, match=r"backend: expected one of auto, torch, triton, got 'cuda'"):
        run(backend="cuda")
    registry.load_kernels()
    monkeypatch.delitem(registry.TRITON, name, raising=False)
    with pytest.raises(RuntimeError, match=rf"backend='triton': no Triton kernel for {name} "):
        run(backend="triton")


def test_a_kernel_is_taken_only_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a kernel registered, a CPU tensor still takes the twin, and an explicit request for it is refused."""
    registry.load_kernels()
    monkeypatch.setattr(registry, "interpreted", lambda: False)
    monkeypatch.setitem(registry.TRITON, "gram", lambda *a: pytest.fail("a kernel ran on a CPU tensor"))
    assert registry.implementation(cpu.gram, "auto", zeros(1)) is cpu.gram
    assert registry.implementation(cpu.gram, "torch", zeros(1)) is cpu.gram
    assert registry.implementation(cpu.gram, "torch", zeros(1).to("meta")) is cpu.gram
    assert registry.implementation(cpu.gram, "auto", zeros(1).to("meta")) is registry.TRITON["gram"]
    with pytest.raises(RuntimeError, match=r"gram got a CPU tensor; move it to a GPU, .* TRITON_INTERPRET"):
        lk.gram(FITTING["left"], FITTING["right"], backend="triton")
