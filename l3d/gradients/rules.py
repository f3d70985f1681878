"""Compute a parameter's part of the gradient at one node of the autograd graph, by one rule per kind of layer.

A rule is registered for an operation and an input slot, as autograd numbers them. It gets the parameter's use, the
batch's layout, the output gradient dy [S, m, *rest] at the node (see `Layout`), and the parameter's shape. It returns
the part, or None if the rule does not apply; then the rule registered before it is asked, and where none applies
`vector_jacobian_product` computes the part, exactly but slowly.

To add a layer kind, write a function here, register it, and add a case to tests/gradients/test_rules.py, which compares
it with torch.func.
"""

from collections.abc import Callable, Mapping
from itertools import dropwhile
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from l3d.gradients.factors import Dense, Part, Rows, matrix_shape
from l3d.gradients.graph.graph import Graph, Use, n_outputs, operation, output_shape
from l3d.gradients.graph.layout import Layout

Rule = Callable[[Use, Layout, Tensor, torch.Size], Part | None]
RULES: dict[tuple[str, int], list[Rule]] = {}  # the latest first
CHANNEL_NORMS = ("NativeGroup", "NativeBatch", "CudnnBatch", "MiopenBatch")


def rule(*keys: tuple[str, int]) -> Callable[[Rule], Rule]:
    """Register a rule for (operation, slot) pairs; where it returns None, earlier rules for the same pair are asked.

    A function of the same module and name, as when a notebook's cell runs again, replaces the earlier one.
    """

    def register(function: Rule) -> Rule:
        for key in keys:
            RULES[key] = [function, *(each for each in RULES.get(key, ()) if _identity(each) != _identity(function))]
        return function

    return register


def _identity(function: Rule) -> tuple[str, str]:
    """Return the module and the name of a rule; one made by a function, or without a name, is its own."""
    name = getattr(function, "__qualname__", "<locals>")
    return function.__module__, str(id(function)) if "<locals>" in name else name


def per_sample(values: Tensor, dy: Tensor) -> Tensor:
    """Repeat each sequence's values for its samples: [B, ...] -> [S, ...]."""
    per_sequence = dy.shape[0] // values.shape[0]
    return values if per_sequence == 1 else values.repeat_interleave(per_sequence, 0)


# --- matrices ---------------------------------------------------------------------------------------------------


@rule(("Mm", 1), ("Addmm", 2))
def matrix(use: Use, layout: Layout, dy: Tensor, shape: torch.Size) -> Part | None:
    """Weight on the right of a matrix product; transposed in Linear, untransposed in the Conv1D of GPT-2."""
    if use.transposed is None or layout.kind == "dim1":  # "dim1": the batch is the product's columns
        return None
    x = layout.split(use.node._saved_self if operation(use.node) == "Mm" else use.node._saved_mat1)
    alpha = getattr(use.node, "_saved_alpha", 1)
    return Rows(x.detach().clone(), dy if alpha == 1 else dy * alpha, x_axis=1 if use.transposed else 0)


@rule(("Addmm", 0))
def matrix_bias(use: Use, layout: Layout, dy: Tensor, shape: torch.Size) -> Part | None:
    """Bias vector added to a matrix product."""
    if use.transposed is not False or layout.kind == "dim1" or len(shape) != 1 or shape[0] != dy.shape[-1]:
        return None
    return Dense(dy.sum(1) * use.node._saved_beta)


@rule(("Embedding", 0))
def embedding(use: Use, layout: Layout, dy: Tensor, shape: torch.Size) -> Part | None:
    """Table of rows looked up by index; the gradient of the padding row is zero."""
    if use.transposed is not False or not layout.fits(use.node._saved_indices.shape):
        return None
    index = layout.split(use.node._saved_indices).flatten(1).clone()
    return _looked_up(index, dy.reshape(dy.shape[0], -1, dy.shape[-1]), use.node, shape)


def _looked_up(index: Tensor, dy: Tensor, node: Any, shape: torch.Size) -> Part:
    """Return the part of a table looked up at index [B, T], with zeros for its padding row; dy [S, T, D]."""
    padding = node._saved_padding_idx
    if 0 <= padding < shape[0]:  # autograd stores "none" as a negative or very large number
        dy = dy.masked_fill(per_sample(index, dy)[..., None] == padding, 0)
    return Rows(index, dy, x_axis=0)


# --- convolutions -----------------------------------------------------------------------------------------------


@rule(("Convolution", 1))
def convolution(use: Use, layout: Layout, dy: Tensor, shape: torch.Size) -> Part | None:
    """Weight of a convolution in one, two or three dimensions; its positions T are the output's pixels.

    With several groups the gradient is multiplied out, all groups in one batched product: it is smaller than its
    factors.
    """
    x, groups = use.node._saved_input, use.node._saved_groups
    if use.transposed is not False or use.node._saved_transposed or x.ndim != len(shape) or layout.kind == "dim1":
        return None
    patches = layout.split(_unfold(x.detach(), shape, use.node)).flatten(1, 2)  # [B, T, C, kernel]
    dy = dy.flatten(3).transpose(2, 3).flatten(1, 2)  # [S, m, O, *out] -> [S, T, O]
    if groups == 1:
        return Rows(patches.flatten(2), dy, x_axis=1)
    x_by_group = patches.unflatten(2, (groups, -1)).flatten(3).transpose(1, 2)  # [B, g, T, I]
    dy_by_group = dy.unflatten(2, (groups, -1)).permute(0, 2, 3, 1)  # [S, g, O/g, T]
    grad = dy_by_group.unflatten(0, (len(x_by_group), -1)) @ x_by_group[:, None]  # [B, P, g, O/g, I]
    return Dense(grad.reshape(-1, *shape))


def _unfold(x: Tensor, shape: torch.Size, node: Any) -> Tensor:
    """Cut images [n, C, *spatial] into the input patch of every output pixel: [n, pixels, C, kernel]."""
    dims = x.ndim - 2
    x = torch.nn.functional.pad(x, [amount for size in reversed(node._saved_padding) for amount in (size, size)])
    for dim in range(dims):
        kernel, dilation, stride = shape[2 + dim], node._saved_dilation[dim], node._saved_stride[dim]
        x = x.unfold(2 + dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]  # windows last
    return x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)).flatten(1, dims).flatten(3)


# --- norms, and what else is per channel ------------------------------------------------------------------------


@rule(("NativeLayerNorm", 1), ("NativeLayerNorm", 2), ("FusedRmsNorm", 1))
def trailing(use: Use, layout: Layout, dy: Tensor, shape: torch.Size) -> Part | None:
    """Scale and shift of LayerNorm, or scale of RMSNorm, over the trailing dimensions.

    FusedRmsNorm is torch's node on GPUs; elsewhere `scale` applies to RMSNorm.
    """
    dims = len(use.node._saved_normalized_shape)
    if use.transposed is not False or dy.ndim < dims + 2:  # the norm includes the batch dimension
        return None
    if use.slot == 1:
        dy = dy * per_sample(layout.split(_normal(use.node).to(dy.dtype)), dy)
    return Dense(dy.flatten(1, dy.ndim - dims - 1).sum(1))


@rule(("Convolution", 2), *((f"{kind}Norm", slot) for kind in CHANNEL_NORMS for slot in (1, 2)))
def channels(use: Use, layout: Layout, dy: Tensor, shape: torch.Size) -> Part | None:
    """Bias of a convolution; scale and shift of GroupNorm, and of BatchNorm in evaluation mode: one per channel."""
    if use.transposed is not False or layout.kind == "dim1" or dy.ndim < 3:
        return None
    if "BatchNorm" in operation(use.node) and getattr(use.node, "_saved_training", True):
        return None  # samples are independent in evaluation mode only
    if use.slot == 1:
        dy = dy * per_sample(layout.split(_normal(use.node).to(dy.dtype)), dy)
    return Dense(dy.flatten(3).sum((1, 3)) if dy.ndim > 3 else dy.sum(1))


def _normal(node: Any) -> Tensor:
    """Return a norm's input after its normalisation, before scale and shift."""
    x, kind = node._saved_input.detach(), operation(node)
    if kind == "NativeLayerNorm":
        return (x - node._saved_result1) * node._saved_result2
    if kind == "FusedRmsNorm":
        return x * node._saved_result1
    if kind == "NativeGroupNorm":
        grouped = x.reshape(x.shape[0], node._saved_group, -1)
        return ((grouped - node._saved_result1[..., None]) * node._saved_result2[..., None]).reshape(x.shape)
    per_channel = (-1, *[1] * (x.ndim - 2))
    scale = (node._saved_running_var + node._saved_eps).rsqrt()
    return (x - node._saved_running_mean.view(per_channel)) * scale.view(per_channel)


# --- elementwise ------------------------------------------------------------------------------------------------


@rule(("Mul", 0), ("Mul", 1))
def scale(use: Use, layout: Layout, dy: Tensor, shape: torch.Size) -> Part | None:
    """Factor broadcast over the batch, such as the weight of a hand-written RMSNorm."""
    other = use.node._saved_other if use.slot == 0 else use.node._saved_self
    if use.transposed is not False or not isinstance(other, Tensor):  # None, or a number
        return None
    values = layout.split(other.detach().expand(use.node._input_metadata[0].shape))
    return _reduced(dy * per_sample(values, dy), layout, shape)


@rule(("Add", 0), ("Add", 1))
def shift(use: Use, layout: Layout, dy: Tensor, shape: torch.Size) -> Part | None:
    """Summand broadcast over the batch: a parameter, or rows of a table such as learned positions."""
    if use.slot == 1 and use.node._saved_alpha != 1:
        dy = dy * use.node._saved_alpha
    if use.chain == ("Embedding",):  # learned positions: looked up once, added to every row of the batch
        table = use.node.next_functions[use.slot][0]
        index = table._saved_indices
        if dy.ndim != 4 or index.shape != (1, dy.shape[2]) or layout.kind == "dim1":
            return None
        return _looked_up(index.repeat(layout.n_rows, dy.shape[1]), dy.flatten(1, 2), table, shape)
    return None if use.transposed is not False else _reduced(dy, layout, shape)


def _reduced(values: Tensor, layout: Layout, shape: torch.Size) -> Part | None:
    """Sum [S, m, *rest] over the dimensions that a parameter of this shape was broadcast over: [S, *shape].

    Returns None if one of the parameter's dimensions is the batch.
    """
    trimmed = list(dropwhile(lambda size: size == 1, shape))
    if len(trimmed) > values.ndim - 2:
        return None
    values = values.flatten(1, values.ndim - len(trimmed) - 1).sum(1)
    for dim, size in enumerate(trimmed, start=1):
        if size == 1 and values.shape[dim] != 1:
            values = values.sum(dim, keepdim=True)
    return Dense(values.reshape(-1, *shape))


# --- anything else ----------------------------------------------------------------------------------------------


def vector_jacobian_product(use: Use, layout: Layout, dy: Tensor, parameter: Tensor) -> Part:
    """Multiply each sample's dy by the node's Jacobian, one backward call of the node per sample (S calls).

    Exact for any operation. The node is called directly, so only this use's slot contributes, even if the parameter has
    other uses.
    """
    source, place = use.node.next_functions[use.slot]  # the parameter after its chain of operations
    shape = source._input_metadata[place].shape
    per_sequence = dy.shape[0] // layout.n_rows
    grads = []
    for sample, row in enumerate(dy):
        alone = torch.zeros(layout.n_rows, *row.shape, dtype=row.dtype, device=row.device)
        alone[sample // per_sequence] = row
        result = use.node(layout.join(alone), *[None] * (n_outputs(use.node) - 1))
        grad = result[use.slot] if isinstance(result, tuple) else result
        grad = grad.to_dense()  # an embedding's gradient may be sparse
        if grad.is_complex() and not use.chain and not parameter.is_complex():
            grad = grad.real
        grad = grad.sum_to_size(shape)  # autograd's engine sums over broadcast dimensions, a node alone does not
        if use.chain:
            (grad,) = torch.autograd.grad([GradientEdge(source, place)], [parameter], [grad], retain_graph=True)
        grads.append(grad.reshape(parameter.shape))
    return Dense(torch.stack(grads))


def has_rule(use: Use) -> bool:
    """Tell whether a rule is registered for this use."""
    return bool(RULES.get((operation(use.node), use.slot)))


def by_rule(use: Use, layout: Layout, dy: Tensor, shape: torch.Size) -> tuple[str, Part | None]:
    """Return the name and the part of the latest rule that applies to a use; the names of all, and None, if none does.

    Raises ValueError, which names the rule, where one that is not in this file fails or returns what is no part.
    """
    key = (operation(use.node), use.slot)
    names = []
    for function in RULES.get(key, ()):
        names.append(getattr(function, "__name__", repr(function)))
        own, cause = function.__module__ != __name__, None
        try:
            part = function(use, layout, dy, shape)
            wrong = _fault(part, layout, dy, shape) if own and part is not None else ""
        except Exception as error:
            if not own or isinstance(error, torch.OutOfMemoryError):
                raise
            cause, wrong = error, f"{type(error).__name__}: {' '.join(str(error).split())}"
        if wrong:
            where = f"{function.__module__}.{names[-1]} for {key[0]} {key[1]}"
            raise ValueError(f"rule {where}, parameter {use.name!r}: {wrong}") from cause
        if part is not None:
            return names[-1], part
    return " or ".join(names), None


def _fault(part: Any, layout: Layout, dy: Tensor, shape: torch.Size) -> str:
    """Say what is wrong with what a rule returned for S = len(dy) samples; "" for a part of this parameter."""
    if isinstance(part, Dense):
        wanted = [len(dy), *shape]
        got = _size(part.grad)
        return "" if got == wanted else f"Dense: expected grad [S, *shape] = {wanted}, got {got}"
    if not isinstance(part, Rows):
        return f"expected Rows(x, dy, x_axis), Dense(grad) or None, got {type(part).__name__}"
    if part.x_axis not in (0, 1):
        return f"Rows: expected x_axis 0 or 1, got {part.x_axis!r}"
    matrix = matrix_shape(shape)
    width, indices = matrix[part.x_axis], isinstance(part.x, Tensor) and part.x.dtype == torch.int64
    x, rows = list(part.x.shape) if indices else _size(part.x), _size(part.dy)
    n_positions = rows[1] if isinstance(rows, list) and len(rows) == 3 else "T"
    wanted = [n_positions] if indices else [n_positions, width]
    wanted_dy = [len(dy), n_positions, matrix[1 - part.x_axis]]
    if not isinstance(x, list) or x[:1] not in ([layout.n_rows], [len(dy)]) or x[1:] != wanted or rows != wanted_dy:
        expected = f"x [B, T, I] = {[layout.n_rows, *wanted]} and dy [S, T, O] = {wanted_dy}".replace("'T'", "T")
        return f"Rows: expected {expected} for x_axis={part.x_axis} and {list(shape)}, got x {x} and dy {rows}"
    if indices and part.x.numel() and not 0 <= part.x.min() <= part.x.max() < width:
        return f"Rows: expected row numbers x from 0 to {width - 1}, got {int(part.x.min())} to {int(part.x.max())}"
    return ""


def _size(value: Any) -> list[int] | str:
    """Return the shape of a real floating-point tensor; what another value is."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return list(value.shape) if value.is_floating_point() else f"{list(value.shape)} {value.dtype}"


def from_output(graph: Graph, layouts: Mapping[Node, Layout], parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the parameters that need a backward pass per sample from the output, each with the reason."""
    found: dict[str, str] = {}
    for use in graph.uses:
        if use.node not in layouts:
            found[use.name] = f"the batch's rows lie in no known layout in its output {list(output_shape(use.node))}"
        elif not has_rule(use) and n_outputs(use.node) != 1:
            found[use.name] = f"no rule for it, and {operation(use.node)} has several outputs"
    for name, parameter in parameters.items():
        if parameter._backward_hooks:
            found[name] = "it has a hook, which only autograd's engine calls"
        if graph.opaque:
            found[name] = "a custom autograd.Function in the model may hide uses"
    return found


def part_of(use: Use, layout: Layout, dy: Tensor, parameter: Tensor) -> Part:
    """Return the part of the parameter's gradient that comes from one use; dy [S, m, *rest]."""
    part = None if dy.is_complex() else by_rule(use, layout, dy, parameter.shape)[1]
    return part if part is not None else vector_jacobian_product(use, layout, dy, parameter)
