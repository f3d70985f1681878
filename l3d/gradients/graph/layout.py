"""Find where the rows of a batch lie in the tensors inside a model, from the graph or by a probing backward pass."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from l3d.gradients.graph.graph import Graph, output_shape

LAYOUTS = ("major", "minor", "dim1")


@dataclass(frozen=True)
class Layout:
    """How the B rows of data lie in a tensor inside the model; read from the graph or proved by a probe.

    "major": dimension 0 is B blocks of m rows; "minor": dimension 0 is m blocks of B rows; "dim1": dimension 1
    is B blocks of rows (sequence-first models, products that einsum batches over a leading 1).
    """

    kind: str
    n_rows: int  # B
    per_block: int = field(default=1, kw_only=True)  # "dim1": entries of dimension 1 per row of data

    def fits(self, shape: torch.Size) -> bool:
        """Tell whether a tensor of this shape can have the layout."""
        if self.kind == "dim1":
            return len(shape) >= 2 and shape[1] == self.n_rows * self.per_block > 0
        blocks, remainder = divmod(shape[0] if shape else 0, self.n_rows)
        return remainder == 0 and blocks > (self.kind == "minor")  # one block is already "major"

    def split(self, tensor: Tensor) -> Tensor:
        """Move the batch to the front: [B, m, *rest]."""
        if self.kind == "major":
            return tensor.unflatten(0, (self.n_rows, -1))
        if self.kind == "minor":
            return tensor.unflatten(0, (-1, self.n_rows)).transpose(0, 1)
        by_entry = tensor.transpose(0, 1)
        return by_entry if self.per_block == 1 else by_entry.unflatten(0, (self.n_rows, -1)).flatten(1, 2)

    def join(self, tensor: Tensor) -> Tensor:
        """Invert `split`: from [B, m, *rest] to the model's own shape."""
        moved = tensor if self.kind == "major" else tensor.transpose(0, 1)
        if self.kind != "dim1":
            return moved.flatten(0, 1)
        by_entry = tensor if self.per_block == 1 else tensor.unflatten(1, (self.per_block, -1)).flatten(0, 1)
        return by_entry.transpose(0, 1)


DIGITS = 25  # number of weights 2^-12 .. 2^12, one per value of a digit; all are exact even in float16


def find_layouts(output: Tensor, graph: Graph) -> dict[Node, Layout]:
    """Return the layout of the output of each node that uses a parameter, without the nodes whose layout is unknown.

    If no operation of the graph can move or mix rows, the layout is "major" everywhere; else a probe proves it,
    in every batch again.
    """
    nodes = list(dict.fromkeys(use.node for use in graph.uses))
    if graph.rows_stay:
        return dict.fromkeys(nodes, Layout("major", output.shape[0]))
    return prove_layouts(output, nodes)


def prove_layouts(output: Tensor, nodes: list[Node]) -> dict[Node, Layout]:
    """Return the layout of each node's output, where it is a known one, by probing backward passes.

    If row b of the gradient at the output is multiplied by w_b, then exactly row b of the gradient at a node must be
    multiplied by w_b. The w_b are powers of two, by which floating-point numbers scale exactly. They encode b in base
    `DIGITS`, one digit per backward pass, so rows that are mixed or moved are detected.
    """
    n_rows = output.shape[0]
    candidates: dict[Node, list[Layout]] = {}
    for node in nodes:
        shape = output_shape(node)
        blocks = max(1, shape[1] // n_rows) if len(shape) > 1 else 1
        each = [Layout(kind, n_rows, per_block=blocks if kind == "dim1" else 1) for kind in LAYOUTS]
        candidates[node] = [layout for layout in each if layout.fits(shape)]
    if n_rows == 1 or not nodes:
        return {node: found[0] for node, found in candidates.items() if found}
    edges = [GradientEdge(node, 0) for node in nodes]
    generator = torch.Generator(output.device).manual_seed(0)
    base = torch.randn(output.shape, generator=generator, dtype=torch.float32, device=output.device).to(output)

    def at_nodes(grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient at every node from that at the output."""
        return torch.autograd.grad([output], edges, [grad], retain_graph=True, allow_unused=True)

    plain = at_nodes(base)
    rows, place = torch.arange(n_rows, device=output.device), 1
    while place < n_rows:
        weights = (2.0 ** (rows // place % DIGITS - DIGITS // 2)).to(output)
        scaled = at_nodes(base * weights.view(-1, *[1] * (output.ndim - 1)))
        for node, before, after in zip(nodes, plain, scaled, strict=True):
            candidates[node] = [each for each in candidates[node] if _scales(each, before, after, weights)]
        place *= DIGITS
    return {node: found[0] for node, found in candidates.items() if found}


def _scales(layout: Layout, before: Tensor | None, after: Tensor | None, weights: Tensor) -> bool:
    """Tell whether every row's gradient was multiplied by its own weight, up to rounding."""
    if before is None or after is None:
        return True
    plain, scaled = layout.split(before).flatten(1), layout.split(after).flatten(1)
    if plain.numel() == 0:
        return False
    tolerance = 8 * torch.finfo(weights.dtype).eps
    difference = (scaled / weights[:, None].to(scaled) - plain).abs().amax(1)
    return bool((difference <= tolerance * plain.abs().amax(1)).all())
