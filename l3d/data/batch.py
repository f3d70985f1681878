"""Count, cut and join the rows of a batch (a tensor, mapping or tuple), and move it to a device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def describe(inputs: Any) -> str:
    """Write the shapes of a batch's tensors, for error messages.

    >>> describe({"input_ids": torch.zeros(2, 3)})
    'input_ids [2, 3]'
    """
    if isinstance(inputs, Tensor):
        return str(list(inputs.shape))
    if isinstance(inputs, Mapping):
        return ", ".join(f"{key} {describe(value)}" for key, value in inputs.items())
    return type(inputs).__name__


def rows_in(batch: Any) -> int | None:
    """Count a batch's rows: the length of its first tensor; None if the batch holds no tensor."""
    return next((len(tensor) for tensor in tensors_of(batch) if tensor.ndim), None)


def count_rows_of(batch: Any) -> int:
    """Count a batch's rows. Raises ValueError if the batch holds no tensor."""
    n_rows = rows_in(batch)
    if n_rows is None:
        raise ValueError(f"data: a batch can only be split by rows if it holds tensors, got {type(batch).__name__}")
    return n_rows


def without_label(batch: Any) -> Any:
    """Return the inputs of a batch: the first entry of a tuple such as (input, label), else the batch itself."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def join(batches: Sequence[Any]) -> Any:
    """Append the rows of several batches: tensors, or mappings or tuples of tensors.

    Returns None if the batches differ in keys, length, dtype or the shape of a row.

    >>> join([torch.zeros(2, 3), torch.zeros(1, 3)]).shape
    torch.Size([3, 3])
    """
    first = batches[0]
    if isinstance(first, Mapping):
        if not all(isinstance(batch, Mapping) and batch.keys() == first.keys() for batch in batches):
            return None
        joined = {key: join([batch[key] for batch in batches]) for key in first}
        n_rows = {None if part is None else rows_in(part) for part in joined.values()}
        return joined if len(n_rows) == 1 and None not in n_rows else None
    if isinstance(first, (tuple, list)):
        by_place = join([dict(enumerate(each)) if isinstance(each, (tuple, list)) else each for each in batches])
        return None if by_place is None else tuple(by_place.values())
    if not all(isinstance(batch, Tensor) and batch.ndim for batch in batches):
        return None
    alike = all(batch.shape[1:] == first.shape[1:] and batch.dtype == first.dtype for batch in batches)
    return torch.cat(list(batches)) if alike else None


def tensors_of(batch: Any) -> list[Tensor]:
    """List the tensors of a batch: the tensor itself, or those in a mapping or tuple."""
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in tensors_of(value)]
    if isinstance(batch, (tuple, list)):
        return [tensor for value in batch for tensor in tensors_of(value)]
    return [batch] if isinstance(batch, Tensor) else []


def rows_of(batch: Any, rows: slice) -> Any:
    """Take neighbouring rows of a tensor, or of every tensor in a mapping or tuple.

    Values without a row for each of the batch's rows are returned whole; the slice of all rows returns the batch.
    """
    n_rows = count_rows_of(batch)
    if rows == slice(0, n_rows):
        return batch
    return on_tensors(batch, lambda tensor: tensor[rows] if tensor.ndim and len(tensor) == n_rows else tensor)


def to_device(inputs: Any, device: torch.device) -> Any:
    """Move a batch (tensor, mapping, tuple) to a device; what is no tensor stays as it is."""
    return on_tensors(inputs, lambda tensor: sent(tensor, device))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; one on its way from the CPU to a GPU is not waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.layout == torch.strided:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")


def on_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a batch (tensor, mapping, tuple); what is no tensor stays as it is."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: on_tensors(value, change) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        changed = [on_tensors(value, change) for value in batch]
        return changed if isinstance(batch, list) else tuple(changed)
    return batch
