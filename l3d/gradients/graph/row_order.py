"""Decide from the autograd graph which operations keep every row of a batch in its place."""

from typing import Any

import torch

# Operations on single entries, or on the entries at one index of several inputs.
ELEMENTWISE = {
    "Abs", "Add", "Alias", "Clone", "Cos", "Div", "Elu", "Exp", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh",
    "LeakyRelu", "Log", "MaskedFill", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Rsqrt", "Sigmoid", "Silu", "Sin",
    "Softplus", "Sqrt", "Sub", "Tanh", "ToCopy", "Where",
}  # fmt: skip
# Operations whose first dimension is a batch: in their first input only, or in all inputs.
BATCHED_FIRST = {
    "Addmm", "AvgPool2D", "AdaptiveAvgPool2D", "Convolution", "CudnnBatchNorm", "FusedRmsNorm", "MaxPool2DWithIndices",
    "Mm", "NativeBatchNorm", "NativeGroupNorm", "NativeLayerNorm",
}  # fmt: skip
BATCHED_ALL = {
    "Baddbmm", "Bmm", "ScaledDotProductCudnnAttention", "ScaledDotProductEfficientAttention",
    "ScaledDotProductFlashAttention", "ScaledDotProductFlashAttentionForCpu",
}  # fmt: skip
# Operations along dimensions that the node saves: rows stay if the first is not among them. These only move entries.
REARRANGE_DIMS = {
    "Expand", "Permute", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Transpose", "Unbind", "UnsafeView",
    "Unsqueeze", "View",
}  # fmt: skip
ALONG_DIMS = REARRANGE_DIMS | {"Cat", "Cumsum", "LogSoftmax", "Mean", "SafeSoftmax", "Softmax", "Stack", "Sum"}


def keeps_rows(kind: str, node: Any, inputs: list[torch.Size | None], n_rows: int) -> bool:
    """Tell whether block b of the output's dimension 0 depends only on block b of each input.

    Args:
        kind: the node's operation.
        node: a node of the autograd graph.
        inputs: the shape of each of its inputs; None for parameters and for inputs without a gradient.
        n_rows: rows of the batch, B; a block is one of B equal parts of dimension 0.

    A wrong False costs a probing backward pass; a wrong True would make gradients wrong. So False is returned for every
    operation that is not known here.
    """
    # the inputs of a backward node are the outputs of its forward operation
    shape = node._input_metadata[0].shape
    if not shape or not shape[0] or shape[0] % n_rows:
        return False
    activations = [size for size in inputs if size is not None]
    if any(not size or size[0] % n_rows for size in activations):
        return False
    if kind in ELEMENTWISE:
        return all(len(size) == len(shape) and size[0] == shape[0] for size in activations)
    if kind == "Embedding":
        return not activations
    if kind in BATCHED_ALL:
        return all(size[0] == shape[0] for size in activations)
    if kind in BATCHED_FIRST:
        at = 1 if kind == "Addmm" else 0
        if any(size is not None for slot, size in enumerate(inputs) if slot != at):
            return False
        if kind in ("NativeLayerNorm", "FusedRmsNorm") and len(node._saved_normalized_shape) >= len(shape):
            return False
        if kind in ("NativeBatchNorm", "CudnnBatchNorm") and getattr(node, "_saved_training", True):
            return False
        return all(size[0] == shape[0] and (kind != "MaxPool2DWithIndices" or len(size) == 4) for size in activations)
    if kind in ("View", "UnsafeView", "ReshapeAlias"):
        return True
    if kind == "ConstantPadNd":  # two amounts per dimension, the last dimension first
        return not any(node._saved_pad[2 * len(shape) - 2 :])
    if kind not in ALONG_DIMS or any(size[0] != shape[0] for size in activations):
        return False
    if kind == "Expand":
        return len(activations) == 1 and len(activations[0]) == len(shape)
    if kind == "Permute":
        return node._saved_dims[0] == 0
    if kind == "Squeeze" and not hasattr(node, "_saved_dim"):
        return n_rows > 1 and len(activations) == 1
    rank = max(len(size) for size in [shape, *activations])
    return all(dim % rank != 0 for dim in dims_of(node))


def dims_of(node: Any) -> list[int]:
    """List the dimensions that a node works along, negative ones counted from the end; [0] if the node saves none."""
    names = ("_saved_dim0", "_saved_dim1") if hasattr(node, "_saved_dim0") else ("_saved_dim",)
    saved = [getattr(node, name, 0) for name in names]
    dims = [dim for value in saved for dim in (value if isinstance(value, tuple) else (value,))]
    return [dim - 2**64 if dim >= 2**63 else dim for dim in dims]
