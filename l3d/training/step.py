"""Take an optimiser step from a batch's per-sample gradients, by the arithmetic that suits the batch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from l3d.decomposition.chunked import objective_in_chunks
from l3d.decomposition.costs import Plan
from l3d.decomposition.flat import flattened
from l3d.decomposition.objective import Objective, n_kept, objective
from l3d.decomposition.subnetworks import Subnetworks
from l3d.distributed.process_group import ProcessGroup
from l3d.gradients.chunks import Chunks
from l3d.gradients.factors import Gradients
from l3d.gradients.precision import own_precision
from l3d.training.checks import finite_losses
from l3d.training.history import Kept
from l3d.training.numpy_step import SmallSteps, has_pairs_only
from l3d.training.optimizer import RelativeAdam, update


class StepResult(NamedTuple):
    """What a batch came to before the step."""

    losses: list[float] | Tensor  # [restarts] Σ‖g_s − ĝ_s‖² / Σ‖g_s‖²; a tensor where the device is not waited for
    kept: Kept  # the kept coefficients, of all processes
    residual: Tensor  # [S] or [S, restarts] ‖g_s − ĝ_s‖²


class Stepper:
    """Takes the steps of one run.

    This is the one place that chooses how a step is computed. Every choice gives the same loss, kept set and
    derivatives, up to rounding:

        numpy    a small batch on a CPU, directions held as pairs of factors (`numpy_step`): calls cost most there
        flat     a small batch otherwise: gradients and directions multiplied out (`l3d.decomposition.flat`)
        factors  gradients as factors or materialised, tensor by tensor, by counted cost (`l3d.decomposition.costs`)
        chunks   a batch in micro-batches, or shared by several processes (`l3d.decomposition.chunked`)

    Args:
        decomposition: the restarts side by side, changed in place.
        optimizer: of its parameters.
        plan: the backend and the number of restarts.
        group: the processes that share the subnetworks, None for one.
        first: which of all subnetworks is this process's first.
        waits: read every step's losses. Otherwise they stay on the device, unchecked; a batch without gradients then
            has the loss NaN, and all derivatives are zero.
    """

    def __init__(
        self,
        decomposition: Subnetworks,
        optimizer: RelativeAdam,
        plan: Plan,
        group: ProcessGroup | None = None,
        first: int = 0,
        waits: bool = True,
    ) -> None:
        self.decomposition, self.optimizer, self.plan = decomposition, optimizer, plan
        self.group, self.first, self.waits = group, first, waits
        self.may_use_numpy = has_pairs_only(decomposition.encoder)
        self._small: SmallSteps | None = None  # made at the first small batch

    @own_precision()
    def objective(self, gradients: Gradients, k: float) -> Objective:
        """Compute every restart's loss of a batch, differentiable."""
        return objective(gradients, self.decomposition.encoder, self.decomposition.decoder, k, self.plan)

    @own_precision()
    def step(self, gradients: Gradients | Chunks, k: float, lr: float) -> StepResult:
        """Keep the fraction k of the coefficients, and step once against the derivatives of the loss.

        Where it waits: raises ValueError where a loss is not finite, NothingToLearnError where all gradients are zero.
        """
        d = self.decomposition
        if isinstance(gradients, Chunks):
            result, derivatives = objective_in_chunks(gradients, d.encoder, d.decoder, k, self.plan, self.group)
        else:
            n = n_kept(k, gradients.n_samples, d.n_subnetworks // self.plan.n_groups)
            plan = self.plan.for_batch(gradients, d.encoder, n * self.plan.n_groups)
            if plan.small and self.may_use_numpy:
                return self._numpy_step(gradients, n, lr)
            result = objective(gradients, d.encoder, d.decoder, k, plan)
            loss = result.loss if self.waits else result.or_zero()
            derivatives = list(torch.autograd.grad(loss.sum(), self.optimizer.parameters))
        losses: Any = result.loss.detach().reshape(-1)
        if self.waits:
            losses = finite_losses(losses.tolist(), gradients)
        update(self.optimizer, d.decoder, derivatives, lr, result.kept.columns, self.plan.backend)
        return StepResult(losses, Kept.of(result.kept, self.group, self.first), result.residual)

    def _numpy_step(self, gradients: Gradients, n: int, lr: float) -> StepResult:
        if self._small is None:
            self._small = SmallSteps(self.decomposition, self.optimizer, self.plan.n_groups)
        learned = self._small.learn(flattened(gradients, self.decomposition.encoder).numpy(), n)
        losses = finite_losses(learned.losses.tolist(), gradients)
        self._small.step(learned, lr)
        return StepResult(losses, Kept.where(learned.kept, learned.thresholds), torch.from_numpy(learned.residual))
