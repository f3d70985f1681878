"""Split one decomposition's training over P processes (ranks) and exchange tensors between them.

Two things are split. A batch's *rows* are split over the ranks to extract their gradients, which takes the costly
passes through the model. The *subnetworks* are split for everything after: a rank owns the encoder and decoder
directions of its K/P subnetworks, their gradients and Adam's moments, from the first step to the last. So no device
holds all directions or all of the optimiser's state, and K may grow with the number of devices. Sent per step:

* the model's outputs, if references are drawn from the whole batch: S · (size of an output);
* the gradients' factors, to every rank: Σ S·T·O + B·T·I numbers. Data-parallel training would instead sum the
  directions' gradients, which are far larger, 2·K·R·Σ(I+O), and are never sent here;
* histograms of magnitudes, for a batch top-k that is exact over all ranks (`batch_topk_over_columns`);
* for ‖ĝ‖² = Σ_pq c_pᵀ M_pq c_q, the decoder directions that some sample has kept, one rank's at a time: a rank holds
  its own and those of one visiting rank. A rank differentiates c_pᵀ M_pp c_p + 2 Σ_{q≠p} c_pᵀ M_pq c_q by its own c_p
  and V_p, with the visiting directions as constants: the backward pass exchanges nothing.

Full replicas that sum gradients (DDP) would be simpler, but each would hold all directions. Splitting the tensors
instead of the subnetworks would need a sum over ranks inside every product. Sums over ranks are gathered and added in
the order of the ranks, so that every rank continues with the same bits.
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

# Longer than any wait for one rank, such as its writing a checkpoint; `watch` notices a rank that has ended.
TIMEOUT = timedelta(hours=2)

T = TypeVar("T")


class ProcessGroup:
    """This process among several, and what it exchanges with the others.

    Attributes: rank (this process's number, from 0), size (the number of processes, P).
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @staticmethod
    def current() -> "ProcessGroup | None":
        """Return torch.distributed's default group; None if there is none or it has one process."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return ProcessGroup()
        return None

    def share(self, n: int) -> slice:
        """Return the slice of n items that this rank owns: contiguous, sizes differing by at most one between ranks."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def stacked(self, tensor: Tensor) -> Tensor:
        """Stack every rank's tensor in the order of the ranks, all of one shape and dtype: [P, ...]."""
        flat = _bytes(tensor)
        gathered = [torch.empty_like(flat) for _ in range(self.size)]
        dist.all_gather(gathered, flat)
        return torch.stack([each.view(tensor.dtype).view(tensor.shape) for each in gathered])

    def total(self, tensor: Tensor) -> Tensor:
        """Sum a small tensor over the ranks, in their order."""
        return self.stacked(tensor).sum(0)

    def gather(self, tensor: Tensor) -> Tensor:
        """Append every rank's tensor [n, ...], where n may differ between ranks: [Σ n, ...]."""
        lengths, padded = self._padded(tensor)
        return torch.cat([each[:length] for each, length in zip(self.stacked(padded), lengths, strict=True)])

    def collect(self, tensor: Tensor) -> Tensor | None:
        """Append every rank's tensor [n, ...] as `gather` does, on the CPU of rank 0; None on the others."""
        lengths, padded = self._padded(tensor.detach().cpu())
        flat = _bytes(padded)
        received = [torch.empty_like(flat) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(flat, received)
        if received is None:
            return None
        parts = [each.view(tensor.dtype).view(padded.shape) for each in received]
        return torch.cat([each[:length] for each, length in zip(parts, lengths, strict=True)])

    def _lengths(self, tensor: Tensor) -> list[int]:
        """Return the length of every rank's tensor."""
        return self.stacked(torch.tensor(len(tensor), device=tensor.device)).tolist()

    def _padded(self, tensor: Tensor) -> tuple[list[int], Tensor]:
        """Return the length of every rank's tensor, and this rank's with zero rows up to the greatest of them."""
        lengths = self._lengths(tensor)
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        return lengths, padded

    def root_mean_squares(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor's root mean square over all its entries on all ranks, one number shaped to broadcast."""
        found = []
        for tensor in tensors:
            square = tensor.detach().square().sum()
            count = torch.tensor(tensor.numel(), dtype=square.dtype, device=square.device)
            square, count = self.total(torch.stack([square, count]))
            found.append((square / count).sqrt().view([1] * tensor.ndim))
        return found

    def visitors(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yield the other ranks' tensors [n, ...], one rank at a time; n may differ, ranks with n = 0 are skipped."""
        for rank, length in enumerate(self._lengths(tensors[0])):
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
        """Call `decide` on rank 0 and return its result on every rank; if it raises, every rank raises its error."""
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
    """View a tensor as bytes [nbytes], which every backend can send, whatever the dtype."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def start() -> ProcessGroup | None:
    """Join the processes that torchrun has started; None if it has started at most one.

    Raises ValueError if torch was built without torch.distributed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    if not dist.is_available():
        raise ValueError("WORLD_SIZE: this build of torch has no torch.distributed; start one process")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    return ProcessGroup.current()


def leave() -> None:
    """Leave the group that `start` has joined; every process must call this.

    Rank 0 leaves last, after the others or 10 s: it holds the store, which they still use.
    """
    gc.collect()  # unused runs refer to the group, whose threads must not outlive the interpreter
    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    with suppress(RuntimeError):  # a rank that has ended in the meantime: nothing is lost, the work is done
        dist.barrier()
    if rank == 0:
        with suppress(RuntimeError):
            store.wait([f"l3d/left/{other}" for other in range(1, size)], timedelta(seconds=10))
    dist.destroy_process_group()
    if rank:
        store.set(f"l3d/left/{rank}", "1")
