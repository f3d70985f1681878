"""Give users one object: a trained decomposition that scores, saves and shares itself, and `load` to read it again."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from l3d.analysis.evaluation import Evaluation, evaluate, impact
from l3d.decomposition.subnetworks import Subnetworks
from l3d.gradients.divergence import Divergence
from l3d.storage import hub, store


class Decomposition(Subnetworks):
    """K low-rank subnetworks of a network's parameters, as `decompose` returns them.

    What they compute (`encode`, `code`, `loss`, `subnetwork`) is `Subnetworks`'; this class adds what needs a model, a
    folder or the hub.

    Attributes:
        shapes: {name: shape} of the decomposed parameters.
        ranks: {name: (rank,)} of matrices, (rank per mode) of higher orders, () of vectors, which are whole.
        settings: how it was trained, resolved: steps, lr, divergence ("callable" for a function), ..
        history: {column: one value per recorded step}: step, error, kept_per_sample, dead_fraction, k, ..
        threshold: the magnitude above which a coefficient counts as kept, outside its batch; NaN until trained.
        timing: seconds and steps_per_second of the training run.
        base_model: name, revision and hashes of the weights it belongs to; empty: any.
    """

    def evaluate(
        self,
        model: nn.Module,
        data: Any,
        *,
        divergence: str | Divergence | None = None,
        reference: str | Tensor | None = None,
        batch_size: int | None = None,
        k: float | None = None,
        selection: str = "batch",
        refit: bool = False,
        n_references: int = 1,
        seed: int | None = None,
        backend: str = "auto",
        any_weights: bool = False,
    ) -> Evaluation:
        """Score the decomposition on data; arguments, result and errors are those of `l3d.evaluate`."""
        return evaluate(
            self,
            model,
            data,
            divergence=divergence,
            reference=reference,
            batch_size=batch_size,
            k=k,
            selection=selection,
            refit=refit,
            n_references=n_references,
            seed=seed,
            backend=backend,
            any_weights=any_weights,
        )

    def impact(
        self,
        model: nn.Module,
        data: Any,
        n_references: int = 10,
        *,
        divergence: str | Divergence | None = None,
        reference: str | Tensor | None = None,
        any_weights: bool = False,
    ) -> Tensor:
        """Return every subnetwork's impact on every sample [n, K]; arguments and errors are those of `l3d.impact`."""
        return impact(
            self, model, data, n_references, divergence=divergence, reference=reference, any_weights=any_weights
        )

    def save(self, path: str | Path) -> None:
        """Write the decomposition into a folder, which is made if missing: safetensors, json and a model card.

        Raises ValueError for settings that json cannot hold; nothing is written then.
        """
        store.save(self, path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the decomposition with its model card to the Hugging Face hub, as one commit.

        Args:
            repo_id: "USER/NAME"; the repository is made if missing.
            private: of a new repository; None is the hub's default.
            revision: the branch; None is main.
            message: of the commit.
            token: of access; None takes the one that `hf auth login` or HF_TOKEN left.

        Returns the commit's address. Raises ValueError in one line where the hub cannot be reached or refuses.
        """
        return hub.push(self, repo_id, private=private, revision=revision, message=message, token=token)


def save(decomposition: Subnetworks, path: str | Path) -> None:
    """Write a decomposition into a folder; see `Decomposition.save`."""
    store.save(decomposition, path)


def load(path: str | Path) -> Decomposition:
    """Read a decomposition from a folder, or from the hub: "hf://USER/NAME" or "hf://USER/NAME@REVISION".

    Loading executes nothing. Raises FileNotFoundError where there is none, ValueError in one line where the files are
    damaged or of another kind, or the hub cannot be reached or refuses.
    """
    folder = hub.pull(str(path)) if str(path).startswith(hub.SCHEME) else path
    return store.load(folder, Decomposition)
