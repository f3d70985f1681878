"""Local Loss Landscape Decomposition: a network's circuits as sparsely active, low-rank directions in weight space.

    decomposition = l3d.decompose(model, data, n_subnetworks=100, rank=8, k=0.1, params="h.4.attn.*", divergence="kl")

Start at `l3d.train`; the loop is in `l3d.run`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l3d import callbacks as callbacks
    from l3d import toys as toys
    from l3d.decomposition import Decomposition as Decomposition
    from l3d.description import describe as describe
    from l3d.evaluation import Evaluation as Evaluation
    from l3d.evaluation import TopSamples as TopSamples
    from l3d.evaluation import evaluate as evaluate
    from l3d.evaluation import impact as impact
    from l3d.evaluation import top_samples as top_samples
    from l3d.extract import Extractor as Extractor
    from l3d.extract import extract_gradients as extract_gradients
    from l3d.factors import Gradients as Gradients
    from l3d.intervention import intervene as intervene
    from l3d.logits import TopLogits as TopLogits
    from l3d.logits import top_logits as top_logits
    from l3d.ratios import InterventionRatios as InterventionRatios
    from l3d.ratios import intervention_ratios as intervention_ratios
    from l3d.store import load as load
    from l3d.store import save as save
    from l3d.train import decompose as decompose
    from l3d.tuning import FineTuned as FineTuned
    from l3d.tuning import finetune as finetune

__version__ = "0.1.0"

# Public name -> its module, imported on first use: torch takes seconds to import, and `l3d --help` should not.
_HOMES = {
    "Decomposition": "decomposition",
    "Evaluation": "evaluation",
    "Extractor": "extract",
    "FineTuned": "tuning",
    "Gradients": "factors",
    "InterventionRatios": "ratios",
    "TopLogits": "logits",
    "TopSamples": "evaluation",
    "decompose": "train",
    "describe": "description",
    "evaluate": "evaluation",
    "extract_gradients": "extract",
    "finetune": "tuning",
    "impact": "evaluation",
    "intervene": "intervention",
    "intervention_ratios": "ratios",
    "load": "store",
    "save": "store",
    "top_logits": "logits",
    "top_samples": "evaluation",
}
_MODULES = ("callbacks", "toys")
__all__ = [*_MODULES, *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"l3d.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'l3d' has no attribute {name!r}")
    return getattr(import_module(f"l3d.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
