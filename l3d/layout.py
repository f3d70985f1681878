"""Where the rows of a batch lie in the tensors inside a model: proved by a probe, never assumed."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from l3d.graph import Use, operation, output_shape

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
        return len(shape) >= 1 and shape[0] % self.n_rows == 0

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


class LayoutProver:
    """Find each node's layout, once for every shape of batch."""

    def __init__(self) -> None:
        self._known: dict[tuple, Layout | None] = {}

    def __call__(self, output: Tensor, uses: list[Use]) -> dict[Node, Layout | None]:
        """Return the layout at every node of the uses, or None where the batch lies in no known way.

        Scaling row b of the gradient at the output by w_b must scale what comes back in exactly b's rows. That is
        checked with two backward passes for the first batch of each shape, and remembered.
        """
        n_rows = output.shape[0]
        nodes = list(dict.fromkeys(use.node for use in uses))
        keys = [(i, operation(node), output_shape(node), n_rows) for i, node in enumerate(nodes)]
        found = {key: self._known[key] for key in keys if key in self._known}
        missing = [i for i, key in enumerate(keys) if key not in found]
        if missing:
            generator = torch.Generator().manual_seed(0)
            base = torch.randn(output.shape, generator=generator).to(output)
            # powers of two scale floating-point numbers exactly, so only rounding of sums can differ
            weights = (2.0 ** (torch.arange(n_rows) * 7 % 13 - 6)).to(output)
            edges = [GradientEdge(nodes[i], 0) for i in missing]
            columns = (-1, *[1] * (output.ndim - 1))
            plain, scaled = (
                torch.autograd.grad([output], edges, [grad], retain_graph=True, allow_unused=True)
                for grad in (base, base * weights.view(columns))
            )
            for i, before, after in zip(missing, plain, scaled, strict=True):
                layout = _layout_of(keys[i][2], before, after, weights)
                found[keys[i]] = layout
                if before is not None and before.any():
                    self._known[keys[i]] = layout
        return {node: found[key] for node, key in zip(nodes, keys, strict=True)}


def _layout_of(shape: torch.Size, before: Tensor | None, after: Tensor | None, weights: Tensor) -> Layout | None:
    for kind in LAYOUTS:
        layout = Layout(kind, weights.shape[0])
        if not layout.fits(shape):
            continue
        if before is None or after is None:
            return layout
        plain, scaled = layout.split(before).flatten(1), layout.split(after).flatten(1)
        difference = (scaled / weights.to(scaled)[:, None] - plain).abs().max()
        if difference <= 1e-3 * plain.abs().max():
            return layout
    return None
