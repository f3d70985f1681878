"""Find how far below a language model's output the positions of a sequence stay separate.

Attention mixes positions. Below the last attention each target position needs its own backward pass; above it one pass
serves all positions. So the head is found, whose vocabulary is then passed once, and below it the last edge before the
last layer's attention, after the final norm, MLP and residual.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from l3d.gradients.graph.graph import operation, output_shape, source_of
from l3d.gradients.graph.row_order import ELEMENTWISE, dims_of


def positionwise_head(output: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Node, GradientEdge | None] | None:
    """Find the head Linear of a language model and the edge of its input, below which the vocabulary no longer enters.

    Follows the output down through operations on each position separately (scalar scale, cast, view that keeps the
    last dimension, slice of the vocabulary, soft-capping's tanh) to a matrix product whose weight is a parameter.
    Returns (the product's node, the edge of its first input, or None if no decomposed parameter is below it). Returns
    None if it meets any other operation.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    node = output.grad_fn
    while node is not None:
        kind = operation(node)
        inputs = [below for below, _ in node.next_functions]
        if kind in ("Mm", "Addmm"):
            slot = 0 if kind == "Mm" else 1
            below = inputs.pop(slot)
            # weight and bias must be parameters themselves: operations that compute them would get no gradient
            if any(other is not None and source_of(other, names, 1) is None for other in inputs):
                return None
            return node, None if below is None else GradientEdge(below, node.next_functions[slot][1])
        if not inputs or inputs[0] is None or any(below is not None for below in inputs[1:]):
            return None
        if not _keeps_positions(kind, node):
            return None
        node = inputs[0]
    return None


def _keeps_positions(kind: str, node: Any) -> bool:
    """Tell whether a one-input node works on every row of the last dimension separately."""
    if kind in ("Tanh", "ToCopy", "Alias"):
        return True
    if kind in ("Mul", "Div"):
        other = node._saved_other
        return not isinstance(other, Tensor) or other.ndim == 0
    width = output_shape(node)[-1]
    if kind in ("View", "UnsafeView"):
        return node._saved_self_sym_sizes[-1] == width
    if kind == "Slice":
        sizes = node._saved_self_sym_sizes
        return node._saved_dim % len(sizes) == len(sizes) - 1 and node._saved_self_sym_sizes[-1] >= width
    return False


def last_apart(edge: GradientEdge, n_rows: int, n_positions: int) -> GradientEdge:
    """Follow the graph down from an edge while positions stay separate; return the last edge that every path passes.

    Tensors at `edge` and at the returned edge have rows and positions first, [rows * positions, ...] or
    [rows, positions, ...]. The walk ends at a use of a parameter and at any operation not known to keep positions
    separate.
    """
    found = edge
    passed: set[Node] = set()
    # every edge out of a passed node leads to a passed or an open one; with one open edge, every path below uses it
    opened: dict[Node, set[int]] = {edge.node: {edge.output_nr}}
    while opened:
        node = max(opened, key=lambda each: each._sequence_nr())  # the latest first: all its users have been passed
        places = opened.pop(node)
        if not opened and len(places) == 1:
            found = GradientEdge(node, min(places))
        below = [(each, place) for each, place in node.next_functions if each is not None]
        if any(each in passed or operation(each) == "AccumulateGrad" for each, _ in below):
            return found
        if not below or not _keeps_apart(node, n_rows, n_positions):
            return found
        passed.add(node)
        for each, place in below:
            opened.setdefault(each, set()).add(place)
    return found


def _keeps_apart(node: Any, n_rows: int, n_positions: int) -> bool:
    """Tell whether a node's output at a row and position depends only on its inputs at that row and position."""

    def lead(size: torch.Size) -> int:  # number of leading dimensions that are row and position; 0: none
        return 2 if size[:2] == (n_rows, n_positions) else int(size[:1] == (n_rows * n_positions,))

    kind, shape = operation(node), output_shape(node)
    slots = [slot for slot, (below, _) in enumerate(node.next_functions) if below is not None]
    inputs = [torch.Size(below._input_metadata[place].shape) for below, place in node.next_functions if below]
    first = lead(shape)
    if not first or not all(map(lead, inputs)):
        return False
    if kind in ("View", "UnsafeView", "ReshapeAlias"):
        return True
    if any(lead(size) != first for size in inputs):
        return False
    if kind in ELEMENTWISE:
        return all(len(size) == len(shape) for size in inputs)
    if kind in ("Mm", "Addmm"):
        return first == 1 and slots == [0 if kind == "Mm" else 1]  # of [rows, positions] it mixes the positions
    if kind in ("NativeLayerNorm", "FusedRmsNorm"):
        return slots == [0] and len(node._saved_normalized_shape) <= len(shape) - first
    if kind in ("Cat", "Mean", "Softmax", "LogSoftmax", "Slice", "Split", "SplitWithSizes", "Sum"):
        return all(dim % len(inputs[0]) >= first for dim in dims_of(node))
    return False
