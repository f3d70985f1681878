"""Where the positions of a sequence have not been mixed yet, seen from a language model's output.

One backward pass per target position is needed below the last operation that mixes positions, attention, and not above
it: there, one pass serves all of them. The head is told apart so that the vocabulary enters only once, and so is
what follows it down to the last layer's attention: norm, MLP, residual.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from l3d.gradients.graph.graph import operation, output_shape, source_of
from l3d.gradients.graph.row_order import ELEMENTWISE, dims_of


def positionwise_head(output: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Node, GradientEdge | None] | None:
    """Find the head Linear of a language model and the edge of its input, where the vocabulary can be left behind.

    Follows the output down through operations that treat every position by itself (scalar scale, cast, view that
    keeps the last dimension, slice of the vocabulary, soft-capping's tanh) to a matrix product whose weight
    is a parameter. Returns (the product's node, the edge of its first input, if anything is decomposed below), or None
    where anything else is met.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    node = output.grad_fn
    while node is not None:
        kind = operation(node)
        inputs = [below for below, _ in node.next_functions]
        if kind in ("Mm", "Addmm"):
            slot = 0 if kind == "Mm" else 1
            below = inputs.pop(slot)
            # weight and bias must be parameters as they are: what they are computed from would be left behind
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
    """Tell whether a one-input node treats every row of the last dimension by itself."""
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
    """Follow the graph down from an edge while positions stay apart; return the last edge that all below passes.

    `edge` is laid out by row and position, [rows * positions, ...] or [rows, positions, ...], and so is what is
    returned. Whatever is not known to keep positions apart ends the walk, the use of a parameter included.
    """
    found = edge
    passed: set[Node] = set()
    # every edge out of what was passed leads to what was passed or is open: with one open, all that is below passes it
    opened: dict[Node, set[int]] = {edge.node: {edge.output_nr}}
    while opened:
        node = max(opened, key=lambda each: each._sequence_nr())  # the latest first: its users have all been met
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
    """Tell whether a node's output at a row and position depends on its inputs there, and on nothing else."""

    def lead(size: torch.Size) -> int:  # how many dimensions tell row and position
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
        return slots == [0 if kind == "Mm" else 1]
    if kind in ("NativeLayerNorm", "FusedRmsNorm"):
        return slots == [0] and len(node._saved_normalized_shape) <= len(shape) - first
    if kind in ("Cat", "Mean", "Softmax", "LogSoftmax", "Slice", "Split", "SplitWithSizes", "Sum"):
        rank = len(inputs[0])
        return all(dim % rank >= first for dim in dims_of(node))
    return False
