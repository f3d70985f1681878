"""A decomposition: K subnetworks, each an encoder direction and a unit-norm decoder direction in parameter space."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import l3d_kernels as lk
from l3d.data.arguments import check_fraction
from l3d.decomposition.costs import Plan
from l3d.decomposition.directions import TORCH_DEFAULTS, Directions, Factory, Rank, resolve_ranks
from l3d.decomposition.objective import objective
from l3d.decomposition.project import project
from l3d.distributed.process_group import ProcessGroup
from l3d.gradients.factors import Gradients
from l3d.gradients.model import exact_pattern
from l3d.gradients.precision import own_precision
from l3d_kernels.sparse import above

if TYPE_CHECKING:
    from typing_extensions import Self


def mean_of_last(errors: Sequence[float]) -> float:
    """Return the mean of the last tenth of a curve: a run's error, not its last batch's; infinity for none."""
    last = errors[-max(1, len(errors) // 10) :]
    return sum(last) / len(last) if last else math.inf


class Subnetworks(nn.Module):
    """K low-rank subnetworks of a network's parameters.

    Args:
        shapes: {name: shape} of the decomposed parameters.
        n_subnetworks: K.
        rank: one number, or {glob: number or one per mode}; see `l3d.decomposition.directions.resolve_ranks`.
        settings: how it was (or is to be) trained; `evaluate` and friends read divergence, reference, positions,
            k, batch_size and seed from it.
        generator: draws the start; the encoder starts as a copy of the decoder.
        columns: which of the K to hold, where other processes hold the rest.
        factory: dtype and device of the tensors, where they are not torch's defaults.

    Attributes:
        encoder, decoder: `Directions`, whose tensors are Parameters; the decoder's norms are one after training.
        history: {column: one value per recorded step} of the training run.
        timing: seconds and steps_per_second of the training run.
        restart_errors: the final error of every restart the best was chosen from.
        first_error: the error of the first step, before anything was learned; NaN where it is not known.
        base_model: which weights it belongs to, as `l3d.storage.identity.identity` describes them; empty: any.
        threshold: the magnitude above which a coefficient counts as kept, outside its batch; NaN until trained.
    """

    @own_precision()
    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        n_subnetworks: int,
        rank: Rank = 8,
        settings: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        columns: slice | None = None,
        factory: Factory = TORCH_DEFAULTS,
    ) -> None:
        super().__init__()
        if n_subnetworks < 1:
            raise ValueError(f"n_subnetworks: expected at least 1, got {n_subnetworks}")
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.ranks = resolve_ranks(rank, self.shapes)
        self.settings: dict[str, Any] = dict(settings or {})
        self.decoder = Directions(self.shapes, self.ranks, n_subnetworks, generator, columns, factory)
        self.encoder = Directions(self.shapes, self.ranks, n_subnetworks, generator, columns, factory)
        self.encoder.load_state_dict(self.decoder.state_dict())
        self.history: dict[str, list[float]] = {}
        self.timing: dict[str, float] = {}
        self.threshold = float("nan")
        self.restart_errors: list[float] = []
        self.first_error = float("nan")
        self.base_model: dict[str, Any] = {}

    @classmethod
    def empty(
        cls,
        shapes: Mapping[str, torch.Size],
        n_subnetworks: int,
        ranks: Mapping[str, tuple[int, ...]],
        settings: Mapping[str, Any],
        like: Tensor,
    ) -> Self:
        """Make a decomposition whose tensors are still to be filled, of the dtype and on the device of `like`.

        `ranks` are resolved ones, as the attribute holds them.
        """
        rank = {exact_pattern(name): each[0] if len(each) == 1 else each for name, each in ranks.items() if each}
        decomposition = cls(shapes, n_subnetworks, rank, settings, factory={"device": "meta"})  # no start is drawn
        return decomposition.to_empty(device=like.device).to(like.dtype)

    @classmethod
    def side_by_side(cls, parts: Sequence[Self]) -> Self:
        """Lay decompositions of the same parameters and ranks side by side, their subnetworks one after another.

        Restarts are trained so, all in one step. The settings are those of the first.
        """
        first = parts[0]
        n_subnetworks = sum(part.n_subnetworks for part in parts)
        whole = cls.empty(first.shapes, n_subnetworks, first.ranks, first.settings, next(first.parameters()))
        with torch.no_grad():
            for target, *tensors in zip(whole.parameters(), *(part.parameters() for part in parts), strict=True):
                target.copy_(torch.cat(tensors))
        return whole

    def part(self, index: int, n_parts: int) -> Self:
        """Copy one of so many equal parts that lie side by side; history and the like stay behind."""
        size = self.n_subnetworks // n_parts
        part = self.empty(self.shapes, size, self.ranks, self.settings, next(self.parameters()))
        with torch.no_grad():
            for target, whole in zip(part.parameters(), self.parameters(), strict=True):
                target.copy_(whole[index * size : (index + 1) * size])
        part.base_model = self.base_model
        return part

    def gathered(self, group: ProcessGroup, n_subnetworks: int) -> Self | None:
        """Return all subnetworks, of which every process holds a share, on the first one's CPU; None on the others."""
        whole = None
        if group.rank == 0:
            like = torch.empty(0, dtype=next(self.parameters()).dtype, device="cpu")
            whole = self.empty(self.shapes, n_subnetworks, self.ranks, self.settings, like)
            whole.base_model = self.base_model
        for name, parameter in self.named_parameters():
            collected = group.collect(parameter)
            if whole is not None and collected is not None:
                whole.get_parameter(name).data.copy_(collected)
        return whole

    def get_extra_state(self) -> Tensor:
        """Return what `state_dict` holds beside the tensors: settings, threshold and identity as JSON, [n] uint8.

        A tensor, so that a state dict can be compared, moved and loaded with weights_only=True as before. Raises
        ValueError for settings that json cannot hold.
        """
        threshold = float(self.threshold) if math.isfinite(self.threshold) else None
        held = {"settings": self.settings, "threshold": threshold, "base_model": self.base_model}
        try:
            text = json.dumps(held, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings: cannot be saved as json ({error})") from error
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over what `get_extra_state` returned. Raises ValueError for anything else."""
        try:
            held = json.loads(bytes(state.cpu().numpy()))
            settings, base_model, threshold = dict(held["settings"]), dict(held["base_model"]), held["threshold"]
            threshold = math.nan if threshold is None else float(threshold)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state_dict: '_extra_state' is not a decomposition's ({error})") from error
        self.settings, self.base_model, self.threshold = settings, base_model, threshold

    @property
    def final_error(self) -> float:
        """The mean error over the last tenth of the history; infinity before training."""
        return mean_of_last(self.history.get("error", []))

    @property
    def diverged(self) -> bool:
        """Whether training ended at more than twice the error it began with, and that of no decomposition, 1.

        It began with `first_error`: a row of a long run's history is a mean over steps that may have diverged already.
        """
        errors = self.history.get("error", [])
        first = errors[0] if errors and math.isnan(self.first_error) else self.first_error
        return bool(errors) and self.final_error > 2 * max(1.0, first)

    def figures(self) -> dict[str, float]:
        """Return the last row of the history, with `final_error` as error; without a dead_fraction not yet known."""
        row = {name: values[-1] for name, values in self.history.items() if values}
        if any(isinstance(value, list) for value in row.values()):
            return {}  # a checkpoint of several restarts, which are no one run
        if row.get("step", 0) < self.settings.get("replacement", {}).get("restart_every", 0):
            row.pop("dead_fraction", None)
        return row | ({"error": self.final_error} if row else {})

    @property
    def n_subnetworks(self) -> int:
        """K."""
        return self.decoder.n_subnetworks

    @property
    def parameter_names(self) -> list[str]:
        """The names of the decomposed parameters, in model order."""
        return list(self.shapes)

    @own_precision()
    def encode(self, gradients: Gradients) -> Tensor:
        """Return the coefficients <Vin_k, g_s>: [S, K]; differentiable in the encoder.

        Raises ValueError where the gradients are of other parameters.
        """
        gradients = self._checked(gradients)
        plan = Plan(small=False).for_batch(gradients, self.encoder, gradients.n_samples * self.n_subnetworks)
        return project(gradients, (self.encoder,), self.shapes, plan)

    def code(self, gradients: Gradients) -> lk.SparseCoefficients:
        """Return the coefficients of magnitude at least `threshold`: every sample by itself, whatever its batch.

        Training keeps the largest of a whole batch; `threshold` is what that came to, on average over the last steps.
        Raises ValueError before training, and where the gradients are of other parameters.
        """
        return self.above_threshold(self.encode(gradients))

    def above_threshold(self, coefficients: Tensor, exponent: int = 0) -> lk.SparseCoefficients:
        """Return those of the coefficients [S, K] that `code` keeps, where they are those of 2^exponent g_s."""
        if self.threshold != self.threshold:
            raise ValueError("threshold: not known before training; set decomposition.threshold, or use encode")
        largest = torch.finfo(coefficients.dtype).max
        return above(coefficients, min(math.ldexp(self.threshold, exponent), largest))

    @own_precision()
    def loss(self, gradients: Gradients, k: float | None = None) -> Tensor:
        """Return the reconstruction error Σ‖g_s − ĝ_s‖² / Σ‖g_s‖² of a batch: a differentiable scalar.

        k is the fraction of coefficients kept, by default the trained one. Nothing is reconstructed; see
        `l3d.decomposition.objective`.
        """
        k = check_fraction("k", self.settings.get("k", 0.1) if k is None else k)
        gradients, _ = self._checked(gradients).in_range()  # a factor on all gradients does not change the ratio
        return objective(gradients, self.encoder, self.decoder, k).loss

    @torch.no_grad()
    def subnetwork(self, index: int) -> dict[str, Tensor]:
        """Return subnetwork `index` as {name: tensor of the parameter's shape}, unit L2 norm over all together.

        Negative indices count from the end. Raises IndexError for an index out of range.
        """
        return self.decoder.tensors(self._checked_index(index))

    def factors(self, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return subnetwork `index` as {name: (left [R, O], right [R, I])}: the tensor is Σ_r left_r ⊗ right_r.

        Of its matrices and tensors of higher order; vectors have no factors. Detached copies.
        """
        found = zip(self.shapes, self.decoder.factors(self._checked_index(index)), strict=True)
        return {name: (f[0].detach().clone(), f[1].detach().clone()) for name, f in found if len(f) == 2}

    def __len__(self) -> int:
        return self.n_subnetworks

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.subnetwork(index)

    def __repr__(self) -> str:
        errors, steps = self.history.get("error", []), self.history.get("step", [])
        figures = [f"K={self.n_subnetworks}"]
        figures += [f"k={self.settings['k']}"] if "k" in self.settings else []
        figures += [f"{len(self.shapes)} tensor{'s' * (len(self.shapes) > 1)}"]
        if errors and not isinstance(errors[-1], list):
            figures += [f"error {self.final_error:.3f} after {steps[-1]} steps"]
        lines = [
            f"  {name} {list(shape)}: {'rank ' + '×'.join(map(str, self.ranks[name])) if self.ranks[name] else 'whole'}"
            for name, shape in self.shapes.items()
        ]
        return "\n".join([f"{type(self).__name__}({', '.join(figures)})", *lines])

    def _repr_html_(self) -> str:
        """Show the figures and, once trained, the curve of the error, for notebooks."""
        text = "<br>".join(html.escape(line) for line in repr(self).splitlines())
        errors = [error for error in self.history.get("error", []) if not isinstance(error, list)]
        if len(errors) < 2:
            return f"<div>{text}</div>"
        top = max(errors) or 1.0  # all of them zero: a flat line
        points = " ".join(
            f"{300 * i / (len(errors) - 1):.1f},{80 * (1 - error / top):.1f}" for i, error in enumerate(errors)
        )
        return (
            f'<div>{text}<br><svg width="300" height="80" viewBox="0 0 300 80" role="img" aria-label="error by step">'
            f'<polyline points="{points}" fill="none" stroke="currentColor"/></svg>'
            f"<br>error by step, from {errors[0]:.3f} to {self.final_error:.3f}</div>"
        )

    def _checked_index(self, index: int) -> int:
        if not -self.n_subnetworks <= index < self.n_subnetworks:
            raise IndexError(f"index: expected {-self.n_subnetworks} <= index < {self.n_subnetworks}, got {index}")
        return index % self.n_subnetworks

    @own_precision()
    def normalize_(self) -> None:
        """Rescale the decoder's directions to unit norm."""
        self.decoder.normalize_()

    def _checked(self, gradients: Gradients) -> Gradients:
        if {n: tuple(s) for n, s in gradients.shapes.items()} != {n: tuple(s) for n, s in self.shapes.items()}:
            raise ValueError(
                f"gradients: expected those of {', '.join(self.shapes)}, got {', '.join(gradients.shapes)}"
            )
        return gradients.to(next(self.parameters()))
