"""Several processes that train one decomposition: what each owns, and what they exchange.

One scheme serves both ends. A batch's *rows* are split over the ranks to extract their gradients, the costly passes
through the model; its *subnetworks* are split for everything after: a rank owns the encoder and decoder directions of
its K/P subnetworks, their gradients and Adam's moments, from the first step to the last. So neither parameters nor
optimiser exist whole on any device, and K may grow with the number of devices. Per step there travel

* outputs of the model, where references are drawn from the whole batch: S · (size of an output);
* the gradients' factors, to everybody: Σ S·T·O + B·T·I, far less than the directions' gradients, which data-parallel
  training would sum: 2·K·R·Σ(I+O), and which here never travel;
* histograms of magnitudes, for a batch top-k that is exact over all ranks (`batch_topk_over_columns`);
* for ‖ĝ‖² = Σ_pq c_pᵀ M_pq c_q, the decoder directions that some sample has kept, one rank's at a time: a rank holds
  its own and one visitor's. What a rank needs of the derivative is that of c_pᵀ M_pp c_p + 2 Σ_{q≠p} c_pᵀ M_pq c_q by
  its own c_p and V_p, the visitors' taken as constants: the backward pass exchanges nothing.

Whole replicas that sum gradients (DDP) would be simpler still, but hold everything everywhere; splitting the tensors
instead of the subnetworks would need a sum over ranks inside every product. What is summed over ranks is gathered and
added in the order of the ranks, so that all of them go on with the same bits.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# Longer than whatever one rank may have the others wait for, a checkpoint say; a rank that ends is noticed otherwise.
TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


class ProcessGroup:
    """This process among several."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @staticmethod
    def current() -> "ProcessGroup | None":
        """Return the processes of torch.distributed's default group; None where there is but one."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return ProcessGroup()
        return None

    def share(self, n: int) -> slice:
        """Return which of n items this rank owns: neighbours, as many for each rank as can be."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def stacked(self, tensor: Tensor) -> Tensor:
        """Stack every rank's tensor, all of one shape: [P, ...]."""
        flat = _bytes(tensor)
        gathered = [torch.empty_like(flat) for _ in range(self.size)]
        dist.all_gather(gathered, flat)
        return torch.stack([each.view(tensor.dtype).view(tensor.shape) for each in gathered])

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a small tensor over the ranks, in their order."""
        return self.stacked(tensor).sum(0)

    def gather(self, tensor: Tensor) -> Tensor:
        """Append every rank's tensor [n, ...], of as many rows as each has: [Σ n, ...]."""
        lengths = self.stacked(torch.tensor(len(tensor), device=tensor.device)).tolist()
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        stacked = self.stacked(padded)
        return torch.cat([each[:length] for each, length in zip(stacked, lengths, strict=True)])

    def collect(self, tensor: Tensor) -> Tensor | None:
        """Append every rank's tensor [n, ...] on the CPU of rank 0, as `gather` does; None on the others."""
        lengths = self.stacked(torch.tensor(len(tensor), device=tensor.device)).tolist()
        padded = torch.zeros(max(lengths), *tensor.shape[1:], dtype=tensor.dtype)
        padded[: len(tensor)] = tensor.detach()
        flat = _bytes(padded)
        received = [torch.empty_like(flat) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(flat, received)
        if received is None:
            return None
        parts = [each.view(tensor.dtype).view(padded.shape) for each in received]
        return torch.cat([each[:length] for each, length in zip(parts, lengths, strict=True)])

    def root_mean_squares(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the root mean square entry of every tensor [n, ...] over all ranks, to multiply the tensor by."""
        found = []
        for tensor in tensors:
            square = tensor.detach().square().sum()
            count = torch.tensor(tensor.numel(), dtype=square.dtype, device=square.device)
            square, count = self.total(torch.stack([square, count]))
            found.append((square / count).sqrt().view([1] * tensor.ndim))
        return found

    def visitors(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield the other ranks' tensors [n, ...], one rank's at a time; n may differ, and 0 is passed over."""
        like = tensors[0]
        lengths = self.stacked(torch.tensor(len(like), device=like.device)).tolist()
        for rank, length in enumerate(lengths):
            if length == 0:
                continue
            visiting = []
            for tensor in tensors:
                sent = tensor if rank == self.rank else tensor.new_empty(length, *tensor.shape[1:])
                flat = _bytes(sent)
                dist.broadcast(flat, src=rank)
                visiting.append(flat.view(tensor.dtype).view(sent.shape))
            if rank != self.rank:
                yield visiting

    def agreed(self, decide: Callable[[], T]) -> T:
        """Decide on rank 0 for all, or raise there what all of them then raise."""
        found: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.rank == 0:
            try:
                found = [(decide(), None)]
            except Exception as raised:
                found = [(None, raised)]
        dist.broadcast_object_list(found, src=0)
        value, error = found[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]


def _bytes(tensor: Tensor) -> Tensor:
    """Read a tensor as bytes, which every backend can send whatever the dtype."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def start() -> ProcessGroup | None:
    """Join the processes that torchrun has started beside this one; None where it has not."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    if not dist.is_available():
        raise ValueError("WORLD_SIZE: this build of torch has no torch.distributed; start one process")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return ProcessGroup.current()


def leave() -> None:
    """Leave the processes that `start` has joined; all of them must. The first leaves last: with it the store goes."""
    gc.collect()  # a run that is no longer used refers to the group, whose threads must not outlive the interpreter
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    dist.barrier()
    if rank == 0:
        with suppress(RuntimeError):  # one that has ended meanwhile needs no waiting for
            store.wait([f"l3d/left/{other}" for other in range(1, size)], timedelta(seconds=10))
        dist.destroy_process_group()
    else:
        dist.destroy_process_group()
        store.set(f"l3d/left/{rank}", "1")
