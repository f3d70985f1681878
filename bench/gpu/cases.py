"""What is checked and timed: every operation, its inputs at each size, and the work that it cannot avoid.

Work is counted from the problem, not from a kernel. `flops` are those of its matrix products, two per multiply-add, by
the cheapest route that the twin knows; bytes are every input read once and every output written once, and for
`sparse_decode` a row of the weight for every entry.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import l3d_kernels as lk
from l3d_kernels import registry

Inputs = dict[str, Any]


class Sizes(NamedTuple):
    """A problem's sizes; `kept` is the fraction of coefficients kept.

    A codes (or samples) of k entries each, L rows (or words) and D features are those of `sparse_decode` and
    `softmax_mean`.
    """

    name: str
    S: int
    B: int
    T: int
    I: int
    O: int
    K: int
    R: int
    kept: float
    A: int = 64
    k: int = 8
    L: int = 100
    D: int = 50

    @property
    def n_kept(self) -> int:
        return max(1, round(self.kept * self.S * self.K))


# What is checked: sizes and dtypes. Every pair compiles kernels of its own, so not all pairs are made.
SMALL = (
    (Sizes("odd", S=6, B=2, T=3, I=37, O=53, K=7, R=3, kept=0.4, A=5, k=3, L=11, D=7), ("bf16", "fp32")),
    (Sizes("single", S=1, B=1, T=1, I=1, O=1, K=1, R=1, kept=1.0, A=1, k=1, L=1, D=1), ("fp32",)),
    (Sizes("all kept", S=5, B=5, T=2, I=65, O=33, K=9, R=2, kept=1.0), ("bf16",)),
)
MEDIUM = (
    (
        Sizes("long", S=12, B=4, T=200, I=96, O=160, K=70, R=5, kept=0.1, A=333, k=33, L=500, D=700),
        ("bf16", "fp16", "tf32", "fp32"),
    ),
    (
        Sizes("high rank", S=64, B=16, T=16, I=256, O=192, K=40, R=70, kept=0.2, A=2048, k=16, L=3000, D=768),
        ("bf16", "tf32"),
    ),
    (
        Sizes("many", S=256, B=16, T=16, I=320, O=448, K=1500, R=3, kept=0.01, A=999, k=64, L=64, D=1000),
        ("bf16", "tf32"),
    ),
)
# for timing: an attention matrix of a block, 256 samples of 16 positions from 16 texts
LARGE = (
    Sizes("width 256", S=256, B=16, T=16, I=256, O=256, K=100, R=25, kept=0.1, A=4096, k=32, L=8192, D=256),
    Sizes("width 2048", S=256, B=16, T=16, I=2048, O=2048, K=1000, R=8, kept=0.02, A=4096, k=64, L=32768, D=2048),
    Sizes("width 4096", S=256, B=16, T=16, I=4096, O=4096, K=4000, R=4, kept=0.005, A=4096, k=64, L=65536, D=4096),
)

# for --dry: runs of everything on a CPU, in Triton's interpreter
DRY = Sizes("dry", S=2, B=1, T=2, I=3, O=4, K=3, R=2, kept=0.5, A=2, k=2, L=3, D=4)


class Op(NamedTuple):
    """An operation of l3d_kernels, with the inputs that it takes from `make` and those that have gradients."""

    run: Callable[[Inputs, str], Tensor]
    takes: tuple[str, ...]
    leaves: tuple[str, ...]
    flops: Callable[[Sizes, Inputs], int]
    is_matrix: bool = True
    extra_bytes: Callable[[Sizes, int], int] = lambda sizes, itemsize: 0
    compared: Callable[[Tensor], Tensor] = lambda value: value  # what of the value is held to the truth
    written: tuple[str, ...] = ()  # inputs that are changed in place


def _project_flops(z: Sizes, i: Inputs) -> int:
    return 2 * z.T * z.K * z.R * (z.B * z.I + z.S * z.O)


def _project_at_flops(z: Sizes, i: Inputs) -> int:
    seen = min(z.B * z.K, z.n_kept)  # x.right once per sequence, or per kept pair
    return 2 * z.T * z.R * (seen * z.I + z.n_kept * z.O)


def _coactive_flops(z: Sizes, i: Inputs) -> int:
    pairs = int(i["kept"].row_offsets.diff().square().sum())
    return 2 * pairs * z.R**2 * (z.I + z.O)


def _gradient_norm_flops(z: Sizes, i: Inputs) -> int:
    if z.T == 1:
        return 0
    pairs = z.T**2 * (z.B * z.I + z.S * z.O)  # x.x' once per sequence
    return 2 * min(pairs, z.S * z.T * z.I * z.O)


def _gram_flops(z: Sizes, i: Inputs) -> int:
    symmetric = z.K * (z.K + 1) // 2 * z.R**2 * (z.I + z.O)
    tiles = z.K * (z.K + 1) // 2 * z.I * z.O + z.K * z.R * z.I * z.O
    return 2 * min(symmetric, tiles)


def kept_of(i: Inputs) -> lk.SparseCoefficients:
    """Return the kept coefficients with the values that gradients are asked for."""
    kept: lk.SparseCoefficients = i["kept"]
    return kept._replace(values=i["values"])


def _update(i: Inputs, backend: str) -> Tensor:
    """Take a step of Adam on left and right, and bring the directions to unit norm; return left."""
    pair = [i["left"], i["right"]]
    ones = pair[0].new_ones(len(pair[0]), dtype=torch.promote_types(pair[0].dtype, torch.float32))
    moments = [[i[f"{kind}_{side}"] for side in ("left", "right")] for kind in ("d", "first", "second")]
    left, right = lk.adam_step(pair, *moments, [ones[:1]] * 2, ones, ones, 0.05, grams=2, backend=backend)
    lk.rescale(pair, (left * right).sum((1, 2)), (2, 2), backend=backend)
    return pair[0]


def project_by(path: str) -> Op:
    """Return the operation `project` with a path of its kernels named, which the table of paths would choose."""

    def run(i: Inputs, backend: str) -> Tensor:
        if backend != "triton":
            return lk.project(i["x"], i["dy"], i["left"], i["right"], backend=backend)
        registry.load_kernels()
        from l3d_kernels.kernels.project.project import project

        return project(i["x"], i["dy"], i["left"], i["right"], path)

    return Op(run, ("x", "dy", "left", "right"), ("left", "right"), _project_flops)


UPDATED = ("left", "right", *(f"{kind}_{side}" for kind in ("d", "first", "second") for side in ("left", "right")))
OPS = {
    "project_fused": project_by("fused"),
    "project_chunked": project_by("chunked"),
    "project_topk": Op(
        lambda i, b: lk.project_topk(i["x"], i["dy"], i["left"], i["right"], i["n"], backend=b).values,
        ("x", "dy", "left", "right", "n"),
        (),
        _project_flops,
        # rounding may swap entries about the threshold, but hardly moves the magnitudes in order
        compared=lambda values: values.abs().sort().values,
    ),
    "project_at": Op(
        lambda i, b: lk.project_at(i["x"], i["dy"], i["left"], i["right"], i["kept"], backend=b),
        ("x", "dy", "left", "right", "kept"),
        ("left", "right"),
        _project_at_flops,
    ),
    "project_dense": Op(
        lambda i, b: lk.project_dense(i["grad"], i["left"], i["right"], backend=b),
        ("grad", "left", "right"),
        ("left", "right"),
        lambda z, i: 2 * z.I * z.O * z.K * (z.S + z.R),
    ),
    "batch_topk": Op(
        lambda i, b: lk.batch_topk(i["coefficients"], i["n"], backend=b).values,
        ("coefficients", "n"),
        (),
        lambda z, i: 0,
        is_matrix=False,
    ),
    "gram": Op(
        lambda i, b: lk.gram(i["left"], i["right"], backend=b), ("left", "right"), ("left", "right"), _gram_flops
    ),
    "gram_energy_coactive": Op(
        lambda i, b: lk.gram_energy_coactive(kept_of(i), i["left"], i["right"], backend=b),
        ("kept", "values", "left", "right"),
        ("values", "left", "right"),
        _coactive_flops,
    ),
    "squared_gradient_norm": Op(
        lambda i, b: lk.squared_gradient_norm(i["x"], i["dy"], backend=b), ("x", "dy"), (), _gradient_norm_flops
    ),
    "reconstruct": Op(
        lambda i, b: lk.reconstruct(kept_of(i), i["left"], i["right"], backend=b),
        ("kept", "values", "left", "right"),
        ("values", "left", "right"),
        lambda z, i: 2 * min(z.n_kept * z.R, z.K * (z.R + z.S)) * z.I * z.O,
    ),
    "squared_residual_norm": Op(
        lambda i, b: lk.squared_residual_norm(kept_of(i), i["left"], i["right"], i["grad"], backend=b),
        ("kept", "values", "left", "right", "grad"),
        ("values", "left", "right"),
        lambda z, i: 2 * min(z.n_kept * z.R, z.K * (z.R + z.S)) * z.I * z.O,
    ),
    "sparse_decode": Op(
        lambda i, b: lk.sparse_decode(i["indices"], i["code"], i["weight"], backend=b),
        ("indices", "code", "weight"),
        ("code", "weight"),
        lambda z, i: 2 * z.A * z.k * z.D,
        is_matrix=False,
        extra_bytes=lambda z, itemsize: (z.A * z.k - z.L) * z.D * itemsize,  # rows read, less the weight read once
    ),
    "softmax_mean": Op(
        lambda i, b: lk.softmax_mean(i["hidden"], i["weight"], backend=b),
        ("hidden", "weight"),
        (),
        lambda z, i: 4 * z.A * z.L * z.D,
    ),
    "update": Op(
        _update,
        UPDATED,
        (),
        lambda z, i: 2 * z.K * z.R**2 * (z.I + z.O),
        # nine numbers for each parameter of a decoder, of which inputs and output are counted four times and left once
        extra_bytes=lambda z, itemsize: (5 * (z.I + z.O) - z.O) * z.K * z.R * itemsize,
        written=UPDATED,
    ),
}
MATERIALISED = ("project_dense", "reconstruct", "squared_residual_norm")  # on arrays [S, O, I]
LARGEST_ARRAY = 1 << 30  # elements of such an array: fewer samples are taken at great widths


def fitting(name: str, sizes: Sizes) -> Sizes:
    """Return the sizes with as many samples as fit where [S, O, I] is an input or an output."""
    if name not in MATERIALISED:
        return sizes
    samples = max(1, min(sizes.S, LARGEST_ARRAY // (sizes.I * sizes.O)))
    return sizes._replace(S=samples, B=min(sizes.B, samples))


def make(name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
    """Draw an operation's inputs, scaled so that results are about one."""
    return draw(OPS[name].takes, sizes, dtype, device, generator)


def draw(
    takes: Iterable[str], sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    """Draw the inputs named, scaled so that results are about one."""
    z = sizes

    def normal(*shape: int, fan: int = 1) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return (drawn / fan**0.5).to(dtype)

    def coefficients() -> Tensor:
        return normal(z.S, z.K)

    recipes: dict[str, Callable[[], Any]] = {
        "x": lambda: normal(z.B, z.T, z.I, fan=z.T),
        "dy": lambda: normal(z.S, z.T, z.O),
        "left": lambda: normal(z.K, z.R, z.O, fan=z.O),
        "right": lambda: normal(z.K, z.R, z.I, fan=z.I),
        "grad": lambda: normal(z.S, z.O, z.I),
        "coefficients": coefficients,
        "n": lambda: z.n_kept,
        "kept": lambda: lk.batch_topk(coefficients(), z.n_kept, backend="torch"),
        "values": lambda: normal(z.n_kept),
        "hidden": lambda: normal(z.A, z.D, fan=z.D),
        "indices": lambda: torch.randint(z.L, (z.A, z.k), generator=generator, device=device),
        "code": lambda: normal(z.A, z.k, fan=z.k),
        "weight": lambda: normal(z.L, z.D),
        "d_left": lambda: normal(z.K, z.R, z.O),
        "d_right": lambda: normal(z.K, z.R, z.I),
        "first_left": lambda: normal(z.K, z.R, z.O),
        "first_right": lambda: normal(z.K, z.R, z.I),
        "second_left": lambda: normal(z.K, z.R, z.O).square(),
        "second_right": lambda: normal(z.K, z.R, z.I).square(),
    }
    return {key: recipes[key]() for key in takes}


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in a value or a named tuple of them."""
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, tuple) else []


def moved_bytes(op: Op, sizes: Sizes, inputs: Inputs, output: Any) -> int:
    """Count the bytes of all inputs and outputs, each once, and what the operation must read more than once."""
    tensors = [t for value in (*inputs.values(), output) for t in tensors_of(value)]
    itemsize = next(t.element_size() for t in tensors if t.is_floating_point())
    return sum(t.numel() * t.element_size() for t in tensors) + op.extra_bytes(sizes, itemsize)
