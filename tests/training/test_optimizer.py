"""Compare relative Adam, whose steps scale with each tensor, with torch's Adam; restore it from its state."""

import json

import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from l3d.training.optimizer import RelativeAdam

from helpers import assert_relative

SHAPES = [(3, 4), (5,), (), (2, 1, 3)]


def start(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(step: int) -> list[Tensor]:
    """Gradients of very different sizes, some of them zero, so that the running means matter."""
    generator = torch.Generator().manual_seed(100 + step)
    sizes = [10.0 ** ((step % 7) - 3), 1.0, 0.0 if step % 3 else 1e-5, 1e4]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64) * size for s, size in zip(SHAPES, sizes, strict=True)
    ]


def rate(step: int) -> float:
    return 0.1 * 0.9**step


@pytest.mark.parametrize("betas, eps", [((0.9, 0.999), 1e-8), ((0.5, 0.9), 1e-3)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_without_scales_it_is_adam(weight_decay: float, betas: tuple[float, float], eps: float) -> None:
    """relative=False takes the steps of torch.optim.Adam, with weight decay of AdamW, to 1e-12 over 50 steps."""
    ours, theirs = start(), start()
    mine = RelativeAdam(ours, relative=False, weight_decay=weight_decay, betas=betas, eps=eps)
    if weight_decay:
        torchs: torch.optim.Optimizer = torch.optim.AdamW(theirs, betas=betas, eps=eps, weight_decay=weight_decay)
    else:
        torchs = torch.optim.Adam(theirs, betas=betas, eps=eps)
    for step in range(50):
        mine.step(gradients(step), rate(step))
        torchs.param_groups[0]["lr"] = rate(step)
        for parameter, gradient in zip(theirs, gradients(step), strict=True):
            parameter.grad = gradient
        torchs.step()
        for a, b in zip(ours, theirs, strict=True):
            assert_relative(a, b, 1e-12)


def test_steps_are_in_units_of_each_tensor_s_scale() -> None:
    """Every step is plain Adam's times the root mean square entry that the tensor had at the start."""
    relative, plain = start(), start()
    scales = [p.detach().square().mean().sqrt() for p in plain]
    a, b = RelativeAdam(relative), RelativeAdam(plain, relative=False)
    for step in range(20):
        before = [p.detach().clone() for p in relative], [p.detach().clone() for p in plain]
        a.step(gradients(step), rate(step))
        b.step(gradients(step), rate(step))
        for ours, theirs, ours_before, theirs_before, scale in zip(relative, plain, *before, scales, strict=True):
            assert_relative(ours - ours_before, (theirs - theirs_before) * scale, 1e-9)


@pytest.mark.parametrize("factor", [1e-3, 100.0])
def test_rescaling_a_problem_rescales_its_path(factor: float) -> None:
    """Parameters a thousandth as large move a thousandth as far for gradients a thousand times as large."""
    small, large = start(), start()
    with torch.no_grad():
        for parameter in small:
            parameter.mul_(factor)
    a, b = RelativeAdam(small, eps=0.0), RelativeAdam(large, eps=0.0)
    for step in range(10):
        grads = [g + 1 for g in gradients(step)]  # none is zero: eps is
        a.step([g / factor for g in grads], rate(step))
        b.step(grads, rate(step))
    for ours, theirs in zip(small, large, strict=True):
        assert_relative(ours, theirs * factor, 1e-9)


def test_first_step_moves_every_entry_by_lr_times_scale() -> None:
    """The first step has the size lr × scale, against the gradient's sign, whatever the gradient's size."""
    parameters = start()
    before = [p.detach().clone() for p in parameters]
    grads = [g * 1e3 + 1e3 for g in gradients(0)]
    RelativeAdam(parameters).step(grads, 0.05)
    for parameter, old, grad in zip(parameters, before, grads, strict=True):
        assert_relative(parameter - old, -0.05 * old.square().mean().sqrt() * grad.sign(), 1e-9)


def test_a_state_holds_each_slice_s_count() -> None:
    """A lazy optimiser read from its state takes the next step to the same bits."""
    generator = torch.Generator().manual_seed(0)
    whole = [nn.Parameter(torch.randn(s, generator=generator)) for s in ROWS]
    copies = [nn.Parameter(p.detach().clone()) for p in whole]
    a, b = RelativeAdam(whole, lazy=True), RelativeAdam(copies, lazy=True)
    grads = [torch.randn(s, generator=generator) for s in ROWS]
    for grad in grads:
        grad[0] = 0
    for optimizer in (a, b):
        optimizer.step(grads, 0.1, torch.tensor([1, 2]))
    tensors, values = a.state()
    resumed = RelativeAdam(copies, lazy=True)
    resumed.load_state(from_bytes(to_bytes({name: t.contiguous() for name, t in tensors.items()})), values)
    for optimizer in (a, resumed):
        optimizer.step([g + 1 for g in grads], 0.1)
    assert tensors["counts"].tolist() == [1, 2, 2]
    assert all(torch.equal(p, q) for p, q in zip(whole, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_state_survives_the_files_of_a_checkpoint(dtype: torch.dtype) -> None:
    """State written as safetensors and json and read into a new optimiser continues with the same bits."""
    whole, interrupted = start(dtype=dtype), start(dtype=dtype)
    a, b = RelativeAdam(whole), RelativeAdam(interrupted)
    for step in range(10):
        for optimizer in (a, b):
            optimizer.step([g.to(dtype) for g in gradients(step)], rate(step))
    tensors, values = b.state()
    copied = from_bytes(to_bytes({name: t.contiguous() for name, t in tensors.items()}))
    resumed = RelativeAdam(interrupted)  # its scales are those of now: the state's must replace them
    resumed.load_state(copied, json.loads(json.dumps(values)))
    for step in range(10, 20):
        for optimizer in (a, resumed):
            optimizer.step([g.to(dtype) for g in gradients(step)], rate(step))
    assert all(torch.equal(p, q) for p, q in zip(whole, interrupted, strict=True))


def test_gradients_are_left_alone_and_history_is_not_recorded() -> None:
    """A step changes parameters only: the gradients keep their bits, and autograd sees nothing."""
    parameters, grads = start(), gradients(1)
    before = [g.clone() for g in grads]
    RelativeAdam(parameters).step(iter(grads), 0.1)
    assert all(torch.equal(g, old) for g, old in zip(grads, before, strict=True))
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in parameters)


def test_minimises_a_quadratic_of_any_scale() -> None:
    """The same lr reaches the minimum of a bowl whether its coordinates are of size 1e-4 or 1e4."""
    for size in (1e-4, 1.0, 1e4):
        parameter = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64) * size)
        optimizer = RelativeAdam([parameter])
        for step in range(400):
            optimizer.step([parameter.detach().clone()], 0.1 * (1 - step / 400))
        assert parameter.abs().max() < 1e-3 * size


ROWS = [(3, 4), (3, 2, 5), (3,)]


@pytest.mark.parametrize("relative", [False, True])
def test_lazy_slices_are_adams_of_their_own(relative: bool) -> None:
    """Each slice is moved as by a torch Adam that steps only when the slice has a gradient, also after forgetting."""
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in ROWS]
    scales = [float(p.detach().square().mean().sqrt()) if relative else 1.0 for p in ours]
    theirs = [[nn.Parameter(row.clone()) for row in p.detach()] for p in ours]

    def adam(i: int) -> torch.optim.Adam:
        return torch.optim.Adam([{"params": [rows[i]]} for rows in theirs])

    adams = [adam(i) for i in range(3)]
    optimizer = RelativeAdam(ours, relative=relative, lazy=True)
    for step, rows in enumerate([[1], [], [1, 1, 2], [0, 1, 2], [2], [0], None, [2, 0], [1]]):
        grads = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ROWS]
        if step == 5:
            optimizer.forget(torch.tensor([2]))
            adams[2] = adam(2)
        for i in range(3):
            if rows is None or i in rows:
                for group, scale, slices, grad in zip(adams[i].param_groups, scales, theirs, grads, strict=True):
                    group["lr"] = rate(step) * scale
                    slices[i].grad = grad[i].clone()
                adams[i].step()
            else:
                for grad in grads:
                    grad[i] = 0
        optimizer.step(grads, rate(step), None if rows is None else torch.tensor(rows, dtype=torch.int64))
        for parameter, slices in zip(ours, theirs, strict=True):
            assert_relative(parameter, torch.stack([row.detach() for row in slices]), 1e-12)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("rows", [[1], [0, 2], [], [2, 1, 0]], ids=str)
def test_forgetting_rows_starts_their_moments_anew(rows: list[int], n_groups: int, lazy: bool) -> None:
    """The moments of those slices are zero, all others keep their bits, as do parameters, scales and count."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64)) for s in ROWS]
    optimizer = RelativeAdam(parameters, n_groups=n_groups, lazy=lazy)
    for _ in range(3):
        optimizer.step([torch.randn(s, generator=generator, dtype=torch.float64) for s in ROWS], 0.1)
    values = [p.detach().clone() for p in parameters]
    tensors, state = optimizer.state()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer.forget(torch.tensor(rows, dtype=torch.int64))
    after, now = optimizer.state()
    others = [row for row in range(3) if row not in rows]
    for name, tensor in after.items():
        if name.startswith("scale"):
            assert torch.equal(tensor, before[name])
            continue
        assert not tensor[rows].any()
        assert before[name][rows].all()  # there was something to forget
        assert torch.equal(tensor[others], before[name][others])
    assert now == state
    assert all(torch.equal(p, value) for p, value in zip(parameters, values, strict=True))
