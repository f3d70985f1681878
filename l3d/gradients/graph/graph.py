"""Read every use of the chosen parameters from the autograd graph of one forward pass.

Autograd records each use of a parameter as an edge, however the model makes it: a module, a functional call, packed or
tied weights, a module called several times. So accounting for every edge accounts for every use, without hooks or
patches. Autograd also guards against in-place operations: it raises if a saved tensor was changed after it was saved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from l3d.gradients.graph.row_order import REARRANGE_DIMS, keeps_rows

# Nodes that only rearrange, copy or cast their one input.
REARRANGE = REARRANGE_DIMS | {"Alias", "AsStrided", "Chunk", "Clone", "ReshapeAlias", "T", "ToCopy", "UnsafeSplit"}
# Those that keep the order of the entries.
KEEP_ORDER = {"Alias", "Clone", "ReshapeAlias", "Squeeze", "ToCopy", "UnsafeView", "Unsqueeze", "View"}


@dataclass(frozen=True)
class Use:
    """One use of a parameter: input `slot` of `node` is the parameter after the rearranging operations `chain`."""

    name: str
    node: Any  # a Node; each operation saves tensors of its own
    slot: int
    chain: tuple[str, ...]  # operations between node and parameter, the node's neighbour first

    @property
    def transposed(self) -> bool | None:
        """Tell whether the node takes the parameter transposed (True), as stored (False), or else rearranged (None)."""
        moves = tuple(step for step in self.chain if step not in ("ToCopy", "Alias", "Clone"))
        return {(): False, ("T",): True}.get(moves)

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The parameter's axes in the order in which the node takes them, without added dimensions of size 1.

        (0, 1) as stored, (1, 0) transposed, also after einsum; None if the chain does more than move whole axes.
        """
        steps, node = [], self.node.next_functions[self.slot][0]
        for _ in self.chain:
            steps.append(node)
            node = node.next_functions[0][0]
        dims = list(enumerate(node.variable.shape))  # (axis, size); the axis of an added dimension is -1
        for step in reversed(steps):
            kind = operation(step)
            if kind == "T":
                dims.reverse()
            elif kind == "Transpose":
                i, j = (_signed(dim) for dim in (step._saved_dim0, step._saved_dim1))
                dims[i], dims[j] = dims[j], dims[i]
            elif kind == "Permute":
                dims = [dims[_signed(dim)] for dim in step._saved_dims]
            elif kind in KEEP_ORDER:
                queue, dims = [dim for dim in dims if dim[0] >= 0], []
                for size in output_shape(step):
                    dims.append(queue.pop(0) if queue and queue[0][1] == size else (-1, size))
                if queue or any(axis < 0 and size != 1 for axis, size in dims):
                    return None
            else:
                return None
        return tuple(axis for axis, _ in dims if axis >= 0)


def _signed(dim: int) -> int:
    """Return a dimension that autograd may have saved as an unsigned number."""
    return dim - 2**64 if dim >= 2**63 else dim


def operation(node: Node) -> str:
    """Return the name of a node's operation: "Addmm" for AddmmBackward0."""
    return node.name().split("::")[-1].split("Backward")[0]


class Graph(NamedTuple):
    """The uses of the chosen parameters in one forward pass."""

    uses: list[Use]  # every use, in a fixed order
    opaque: bool  # a custom autograd.Function may use parameters without an edge: `uses` may be incomplete
    rows_stay: bool  # dimension 0 of every tensor is the batch, or blocks of it; no operation moves or mixes rows
    n_entries: int  # in all operations' outputs, about what the graph holds
    n_activations: int  # of them without those that rearrange a parameter
    reached: set[str]  # the chosen parameters that the graph holds


def read_graph(root: Node, parameters: Mapping[str, Tensor], n_rows: int) -> Graph:
    """Walk the autograd graph below the output's node `root`; the batch has `n_rows` rows.

    Raises ValueError for reentrant checkpointing, whose parameters are not in the graph, and for an embedding that
    scales its gradients by frequency.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    uses: list[Use] = []
    reached: set[str] = set()
    opaque = source_of(root, names, n_rows) is not None  # the output is a rearranged parameter: a use without a node
    rows_stay = True
    n_entries = n_activations = 0
    seen = {root}
    stack = [root]
    while stack:
        node = stack.pop()
        kind = operation(node)
        if kind == "AccumulateGrad":
            reached.add(names.get(id(node.variable), ""))  # type: ignore[attr-defined]
            continue
        if kind == "WarnNotImplemented":
            _refuse_below(node, names)
        n_entries += output_shape(node).numel()
        if kind == "CheckpointFunction":
            raise ValueError(
                "model: reentrant checkpointing hides parameters; use checkpoint(..., use_reentrant=False)"
            )
        if getattr(node, "_saved_scale_grad_by_freq", False):
            raise ValueError("params: an embedding scales gradients by frequency, which has no per-sample form")
        opaque = opaque or isinstance(node, torch.autograd.function.BackwardCFunction)
        rearranges = source_of(node, names, n_rows) is not None
        n_activations += 0 if rearranges else output_shape(node).numel()
        origins = [source_of(below, names, n_rows) if below else None for below, _ in node.next_functions]
        inputs = [  # the shape of each; None for parameters and for inputs without a gradient
            below._input_metadata[place].shape if below and not origin else None
            for (below, place), origin in zip(node.next_functions, origins, strict=True)
        ]
        rows_stay = rows_stay and (rearranges or keeps_rows(kind, node, inputs, n_rows))
        for slot, ((below, _), origin) in enumerate(zip(node.next_functions, origins, strict=True)):
            if origin and not rearranges:
                uses.append(Use(origin[0], node, slot, origin[1]))
            if below and below not in seen:
                seen.add(below)
                stack.append(below)
    return Graph(uses, opaque, rows_stay, n_entries, n_activations, reached)


def _refuse_below(node: Any, names: Mapping[int, str]) -> None:
    """Raise ValueError if a chosen parameter is below an operation without a derivative, where autograd only warns."""
    seen, stack = {node}, [node]
    while stack:
        at = stack.pop()
        if operation(at) == "AccumulateGrad" and id(at.variable) in names:
            raise ValueError(
                f"params: the output depends on {names[id(at.variable)]!r} through an operation that registers no "
                "derivative, so its gradient would be missing; register one (torch.library.register_autograd)"
            )
        below = {each for each, _ in at.next_functions if each is not None} - seen
        seen |= below
        stack += below


def source_of(node: Any, names: Mapping[int, str], n_rows: int) -> tuple[str, tuple[str, ...]] | None:
    """Return (name, operations) of the parameter that a node only rearranges; None for any other node."""
    chain: list[str] = []
    while True:
        kind = operation(node)
        if kind == "AccumulateGrad":
            name = names.get(id(node.variable))
            return None if name is None else (name, tuple(chain))
        # a table looked up once for all rows (learned positions) counts as a rearrangement
        shared = kind == "Embedding" and n_rows > 1 and output_shape(node)[0] == 1
        if not (shared or kind in REARRANGE) or len(node.next_functions) != 1 or node.next_functions[0][0] is None:
            return None
        chain.append(kind)
        node = node.next_functions[0][0]


def output_shape(node: Any) -> torch.Size:
    """Return the shape of a node's first output."""
    return torch.Size(node._input_metadata[0].shape)


def no_gradient(node: Any, device: torch.device) -> Tensor:
    """Return a zero gradient for a node's first output."""
    return torch.zeros(output_shape(node), dtype=node._input_metadata[0].dtype, device=device)


def n_outputs(node: Any) -> int:
    """Return the number of a node's outputs."""
    return len(node._input_metadata)
