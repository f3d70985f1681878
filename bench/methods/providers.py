"""Every public operation by several providers: the dense formulas, the torch twin, the kernels; and the truth of each.

* published: the method's formula on materialised gradients [S, O, I], by one einsum over them and the factors;
* afternoon: the same by plain matrix products with directions multiplied out [K, O, I], indexing instead of masking;
* l3d torch, l3d triton: ours.

A dense provider is handed the gradients materialised: what that costs is extraction's (suites/test_extraction.py).
Directions change with every step, so it forms them itself. Truths are definitions, computed in float64.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import l3d_kernels as lk
from bench.gpu.cases import OPS as KERNELS
from bench.gpu.cases import Inputs, Op, Sizes, draw, kept_of
from bench.gpu.checks import outcome, widened
from bench.gpu.measure import parts
from bench.methods import published
from l3d.decomposition.costs import Path, projection_costs
from l3d.decomposition.costs import Sizes as CostSizes
from l3d_kernels.splitting import outer

BACKENDS = {"l3d torch": "torch", "l3d triton": "triton"}
PROVIDERS = ("published", "afternoon", *BACKENDS)

# attention matrices of stories260k (16 texts of 16 tokens) and of TinyStories-8M (4); and codes of an autoencoder
SMALL = Sizes("width 64", S=256, B=16, T=16, I=64, O=64, K=100, R=6, kept=0.1, A=256, k=16, L=512, D=64)
MIDDLE = Sizes("width 256", S=64, B=4, T=16, I=256, O=256, K=100, R=25, kept=0.1, A=1024, k=32, L=8192, D=256)
SHAPES = {sizes.name: sizes for sizes in (SMALL, MIDDLE)}
TINY = Sizes("tiny", S=4, B=2, T=2, I=3, O=5, K=6, R=2, kept=0.5, A=3, k=2, L=7, D=4)


class Compared(NamedTuple):
    """An operation with what it is compared with; a provider that has no formula of its own is None."""

    op: Op
    truth: Callable[[Inputs], Tensor]
    published: Callable[[Inputs], Tensor] | None
    afternoon: Callable[[Inputs], Tensor] | None
    trains: bool = False  # its backward pass is part of a training step
    torch: Callable[[Inputs], Tensor] | None = None  # ours on a CPU, where it is more than `op`

    def providers(self) -> list[str]:
        """Name the providers that there are for this operation."""
        return [name for name in PROVIDERS if name in BACKENDS or getattr(self, name) is not None]

    def by(self, provider: str) -> Callable[[Inputs], Tensor]:
        """Return the operation by one of PROVIDERS."""
        if provider == "l3d torch" and self.torch is not None:
            return self.torch
        if provider in BACKENDS:
            return lambda i: self.op.run(i, BACKENDS[provider])
        run: Callable[[Inputs], Tensor] | None = getattr(self, provider)
        if run is None:
            raise ValueError(f"provider: expected one of {', '.join(self.providers())}, got {provider!r}")
        return run


# --- the formulas ---------------------------------------------------------------------------------------------------


def _tucker(i: Inputs) -> list[Tensor]:
    """The directions as published: a core, which is the identity here, and a factor per mode."""
    n_subnetworks, rank, _ = i["left"].shape
    return [torch.eye(rank).to(i["left"]).expand(n_subnetworks, -1, -1), i["left"], i["right"]]


def _flat_directions(i: Inputs) -> Tensor:
    return (i["left"].mT @ i["right"]).flatten(1)


def _gradient(i: Inputs) -> Tensor:
    return i["grad"] if "grad" in i else outer(i["x"], i["dy"])


def _published_project(i: Inputs) -> Tensor:
    with published.left_to_right():
        return published.encode(_gradient(i), _tucker(i))


def _afternoon_project(i: Inputs) -> Tensor:
    return _gradient(i).flatten(1) @ _flat_directions(i).mT


def _path(i: Inputs) -> Path:
    """The path that training takes through a tensor of this size, of which a tenth is kept."""
    (n_sequences, n_positions, n_inputs), (n_samples, _, n_outputs) = i["x"].shape, i["dy"].shape
    n_subnetworks, rank, _ = i["left"].shape
    n_kept = round(0.1 * n_samples * n_subnetworks)
    sizes = n_sequences, n_samples, n_positions, n_inputs, n_outputs, n_subnetworks, rank, n_kept
    costs = projection_costs(CostSizes(*sizes))
    return min(costs, key=costs.__getitem__)


def _our_project(i: Inputs) -> Tensor:
    if _path(i).materialised:
        return lk.project_dense(_gradient(i), *_factors(i), backend="torch")
    return lk.project(i["x"], i["dy"], *_factors(i), backend="torch")


def _our_project_at(i: Inputs) -> Tensor:
    if _path(i).sampled:
        return lk.project_at(i["x"], i["dy"], *_factors(i), i["kept"], backend="torch")
    return _our_project(i)[_pairs(i)]


def _published_project_at(i: Inputs) -> Tensor:
    mask = i["kept"]._replace(values=torch.ones_like(i["kept"].values)).dense()
    return (_published_project(i) * mask)[_pairs(i)]


def _published_topk(i: Inputs) -> Tensor:
    magnitudes = i["coefficients"].abs()
    return i["coefficients"] * (magnitudes >= magnitudes.flatten().topk(i["n"]).values.min())


def _afternoon_topk(i: Inputs) -> Tensor:
    flat = i["coefficients"].flatten()
    index = flat.abs().topk(i["n"], sorted=False).indices
    return torch.zeros_like(flat).scatter(0, index, flat[index]).view_as(i["coefficients"])


def _true_topk(i: Inputs) -> Tensor:
    flat = i["coefficients"].flatten()
    return flat[flat.abs().argsort(descending=True, stable=True)[: i["n"]].sort().values]


def _published_reconstruct(i: Inputs) -> Tensor:
    with published.left_to_right():
        return published.reconstruct(kept_of(i).dense(), _tucker(i))


def _flat_reconstruct(i: Inputs) -> Tensor:
    return kept_of(i).dense() @ _flat_directions(i)


def _dense_code(i: Inputs) -> Tensor:
    empty = i["code"].new_zeros(len(i["code"]), len(i["weight"]))
    return empty.scatter_add(1, i["indices"], i["code"]) @ i["weight"]


def _softmax_mean(i: Inputs) -> Tensor:
    return (i["hidden"] @ i["weight"].mT).softmax(1) @ i["weight"]


def _pairs(i: Inputs) -> tuple[Tensor, Tensor]:
    return i["kept"].rows, i["kept"].columns


def _true_project(i: Inputs) -> Tensor:
    """From rows if there are any: for every pair of a row and a rank."""
    if "x" not in i:
        return _afternoon_project(i)
    seen = torch.einsum("bti,kri->btkr", i["x"], i["right"]).repeat_interleave(len(i["dy"]) // len(i["x"]), 0)
    return (seen * torch.einsum("sto,kro->stkr", i["dy"], i["left"])).sum((1, 3))


def _true_gradient_norm(i: Inputs) -> Tensor:
    x = i["x"].repeat_interleave(len(i["dy"]) // len(i["x"]), 0)
    return ((x @ x.mT) * (i["dy"] @ i["dy"].mT)).sum((1, 2))


def _true_reconstruct(i: Inputs) -> Tensor:
    return _flat_reconstruct(i).unflatten(1, (i["left"].shape[2], -1))


def _true_energy(i: Inputs) -> Tensor:
    return _true_reconstruct(i).square().sum((1, 2))


def _nonzero(value: Tensor) -> Tensor:
    return value[value != 0]


FACTORS = ("left", "right")
PUBLIC = {
    "project": Compared(
        KERNELS["project_fused"]._replace(run=lambda i, b: lk.project(i["x"], i["dy"], *_factors(i), backend=b)),
        *(_true_project, _published_project, _afternoon_project),
        trains=True,
        torch=_our_project,
    ),
    "project_at": Compared(
        KERNELS["project_at"],
        lambda i: _true_project(i)[_pairs(i)],
        _published_project_at,
        lambda i: _afternoon_project(i)[_pairs(i)],
        trains=True,
        torch=_our_project_at,
    ),
    "project_dense": Compared(
        KERNELS["project_dense"], _true_project, _published_project, _afternoon_project, trains=True
    ),
    "batch_topk": Compared(
        KERNELS["batch_topk"]._replace(compared=_nonzero), _true_topk, _published_topk, _afternoon_topk
    ),
    "gram_energy": Compared(
        Op(
            lambda i, b: lk.gram_energy(kept_of(i), *_factors(i), backend=b),
            ("kept", "values", *FACTORS),
            ("values", *FACTORS),
            KERNELS["gram"].flops,
        ),
        _true_energy,
        lambda i: _published_reconstruct(i).square().sum((1, 2)),
        lambda i: _flat_reconstruct(i).square().sum(1),
        trains=True,
    ),
    "squared_gradient_norm": Compared(
        KERNELS["squared_gradient_norm"], _true_gradient_norm, lambda i: _gradient(i).square().sum((1, 2)), None
    ),
    "reconstruct": Compared(
        KERNELS["reconstruct"],
        _true_reconstruct,
        _published_reconstruct,
        _true_reconstruct,
    ),
    "squared_residual_norm": Compared(
        KERNELS["squared_residual_norm"],
        lambda i: (i["grad"] - _true_reconstruct(i)).square().sum((1, 2)),
        lambda i: (i["grad"] - _published_reconstruct(i)).square().sum((1, 2)),
        lambda i: (i["grad"].flatten(1) - _flat_reconstruct(i)).square().sum(1),
    ),
    "sparse_decode": Compared(
        KERNELS["sparse_decode"],
        lambda i: torch.einsum("ak,akd->ad", i["code"], i["weight"][i["indices"]]),
        _dense_code,
        lambda i: (i["weight"][i["indices"]] * i["code"][..., None]).sum(1),
        trains=True,
    ),
    "softmax_mean": Compared(KERNELS["softmax_mean"], _softmax_mean, _softmax_mean, None),
}


def _factors(i: Inputs) -> tuple[Tensor, Tensor]:
    return i["left"], i["right"]


# --- inputs, truths and calls ---------------------------------------------------------------------------------------


def inputs_of(name: str, sizes: Sizes, device: torch.device) -> Inputs:
    """Draw an operation's inputs."""
    return draw(PUBLIC[name].op.takes, sizes, torch.float32, device, torch.Generator(device).manual_seed(0))


def truth_of(name: str, inputs: Inputs) -> dict[str, Tensor]:
    """Return an operation's true value and gradients, by its definition in float64."""
    return outcome(PUBLIC[name].truth, widened(inputs), PUBLIC[name].op.leaves)


def outcome_of(name: str, inputs: Inputs, provider: str) -> dict[str, Tensor]:
    """Return an operation's value and gradients by a provider, as they are compared with the truth."""
    compared, run = PUBLIC[name].op.compared, PUBLIC[name].by(provider)
    return outcome(lambda i: compared(run(i)), inputs, PUBLIC[name].op.leaves)


def calls_of(name: str, inputs: Inputs, provider: str) -> dict[str, Callable[[], Any]]:
    """Return the calls to time: "forward", and "backward" where training takes it."""
    wanted = PUBLIC[name].op.leaves if PUBLIC[name].trains else ()
    return parts(PUBLIC[name].by(provider), inputs, wanted)


def prepared(name: str, shape: str, part: str, provider: str) -> Callable[[], Any]:
    """Return a call on inputs of its own, once the same has run at a tiny size: for `measure.peak.of`, on the CPU."""
    cpu = torch.device("cpu")
    calls_of(name, inputs_of(name, TINY, cpu), provider)[part]()
    return calls_of(name, inputs_of(name, SHAPES[shape], cpu), provider)[part]
