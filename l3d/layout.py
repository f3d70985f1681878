"""Where the rows of a batch lie in the tensors inside a model: proved by a probe, never assumed."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from l3d.graph import Graph, output_shape

LAYOUTS = ("major", "minor", "dim1")


@dataclass(frozen=True)
class Layout:
    """How the B rows of data lie in a tensor inside the model. It is proved by a probe, never assumed.

    "major": dimension 0 is B blocks of m rows; "minor": dimension 0 is m blocks of B rows; "dim1": dimension 1
    is B (sequence-first models).
    """

    kind: str
    n_rows: int  # B

    def fits(self, shape: torch.Size) -> bool:
        """Tell whether a tensor of this shape can have the layout at all."""
        if self.kind == "dim1":
            return len(shape) >= 2 and shape[1] == self.n_rows
        blocks, rest = divmod(shape[0] if shape else 0, self.n_rows)
        return rest == 0 and blocks > (self.kind == "minor")  # one block is "major" just as well

    def split(self, tensor: Tensor) -> Tensor:
        """Bring the batch to the front: [B, m, *rest]."""
        if self.kind == "major":
            return tensor.unflatten(0, (self.n_rows, -1))
        if self.kind == "minor":
            return tensor.unflatten(0, (-1, self.n_rows)).transpose(0, 1)
        return tensor.transpose(0, 1)

    def join(self, tensor: Tensor) -> Tensor:
        """Undo `split`: from [B, m, *rest] to the model's own shape."""
        if self.kind == "major":
            return tensor.flatten(0, 1)
        if self.kind == "minor":
            return tensor.transpose(0, 1).flatten(0, 1)
        return tensor.transpose(0, 1)


DIGITS = 25  # powers of two that a row's number is written in: 2^-12 .. 2^12 are exact even in float16


PROOFS = 8  # agreeing proofs after which batches of one kind are trusted ..
AGAIN = 16  # .. but for every so many


class LayoutProver:
    """Prove the layouts of each batch's nodes; where rows hardly move unseen, some proofs per kind of batch will do."""

    def __init__(self) -> None:
        self._proved: dict[tuple, _Record] = {}

    def __call__(self, output: Tensor, graph: Graph) -> dict[Node, Layout | None]:
        """Return the layout of each parameter-using node's output; None where the batch lies in no known way.

        Raises ValueError where a batch contradicts what many before it agreed on.
        """
        nodes = list(dict.fromkeys(use.node for use in graph.uses))
        if graph.signature is None:
            return prove_layouts(output, nodes)[0]
        places = tuple((use.name, use.slot) for use in graph.uses)
        record = self._proved.setdefault((graph.signature, output.shape, places), _Record())
        record.batches += 1
        trusted = record.proofs >= PROOFS
        if trusted and record.batches % AGAIN:
            return dict(zip(nodes, record.layouts, strict=True))
        layouts, settled = prove_layouts(output, nodes)
        if settled:
            agrees = record.proofs == 0 or record.layouts == list(layouts.values())
            if trusted and not agrees:
                raise ValueError(
                    "model: the rows of the batch changed places inside it from one batch to another, so gradients "
                    "since the last proof may be wrong; use extract_gradients, which proves every batch"
                )
            record.layouts = list(layouts.values())
            record.proofs = record.proofs + 1 if agrees else -(2**62)  # once at odds, proved for ever
        return layouts


@dataclass
class _Record:
    """What the proofs of one kind of batch found."""

    batches: int = 0
    proofs: int = 0  # that agreed
    layouts: list[Layout | None] = field(default_factory=list)


def prove_layouts(output: Tensor, nodes: list[Node]) -> tuple[dict[Node, Layout | None], bool]:
    """Return the layout of each node's output (None: no known one), and whether no other batch could show another.

    Scaling row b of the gradient at the output by w_b must scale what comes back in exactly b's rows. The w_b are
    powers of two, by which floating-point numbers scale exactly, and write b's number in base `DIGITS`, a digit per
    backward pass: rows that mix or change places show.
    """
    n_rows = output.shape[0]
    candidates = {
        node: [layout for kind in LAYOUTS if (layout := Layout(kind, n_rows)).fits(output_shape(node))]
        for node in nodes
    }
    if n_rows == 1 or not nodes:
        return {node: found[0] if found else None for node, found in candidates.items()}, True
    edges = [GradientEdge(node, 0) for node in nodes]
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(output.shape, generator=generator).to(output)

    def returned(grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad([output], edges, [grad], retain_graph=True, allow_unused=True)

    plain = returned(base)
    rows, place = torch.arange(n_rows), 1
    while place < n_rows:
        weights = (2.0 ** (rows // place % DIGITS - DIGITS // 2)).to(output)
        scaled = returned(base * weights.view(-1, *[1] * (output.ndim - 1)))
        for node, before, after in zip(nodes, plain, scaled, strict=True):
            candidates[node] = [each for each in candidates[node] if _scales(each, before, after, weights)]
        place *= DIGITS
    layouts = {node: found[0] if found else None for node, found in candidates.items()}
    # settled where no layout is left, or one is and every row had a gradient to tell it by
    settled = all(
        not found or (before is not None and len(found) == 1 and bool(found[0].split(before).flatten(1).any(1).all()))
        for before, found in zip(plain, candidates.values(), strict=True)
    )
    return layouts, settled


def _scales(layout: Layout, before: Tensor | None, after: Tensor | None, weights: Tensor) -> bool:
    """Tell whether every row's gradient was scaled by its own weight, to rounding."""
    if before is None or after is None:
        return True
    plain, scaled = layout.split(before).flatten(1), layout.split(after).flatten(1)
    if plain.numel() == 0:
        return False
    tolerance = 8 * torch.finfo(weights.dtype).eps
    difference = (scaled / weights[:, None].to(scaled) - plain).abs().amax(1)
    return bool((difference <= tolerance * plain.abs().amax(1)).all())
