"""Give users one object: a trained decomposition that scores, saves and shares itself, and `load` to read it again."""

from pathlib import Path

from l3d.analysis import evaluation
from l3d.decomposition.subnetworks import Subnetworks
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

    evaluate = evaluation.evaluate
    """Score the decomposition on data; arguments, result and errors are those of `l3d.evaluate`."""

    impact = evaluation.impact
    """Return every subnetwork's impact on every sample [n, K]; arguments and errors are those of `l3d.impact`."""

    save = store.save
    """Write the decomposition into a folder; arguments and errors are those of `l3d.save`."""

    push_to_hub = hub.push
    """Upload the decomposition with its model card to the Hugging Face hub, as one commit.

    Args:
        repo_id: "USER/NAME"; the repository is made if missing.
        private: of a new repository; None is the hub's default.
        revision: the branch; None is main.
        message: of the commit.
        token: of access; None takes the one that `hf auth login` or HF_TOKEN left.

    Returns the commit's address. Raises ValueError in one line where the hub cannot be reached or refuses.
    """


def load(path: str | Path) -> Decomposition:
    """Read a decomposition from a folder, or from the hub: "hf://USER/NAME" or "hf://USER/NAME@REVISION".

    Loading executes nothing. Raises FileNotFoundError where there is none, ValueError in one line where the files are
    damaged or of another kind, or the hub cannot be reached or refuses.
    """
    folder = hub.pull(str(path)) if str(path).startswith(hub.SCHEME) else path
    return store.load(folder, Decomposition)
