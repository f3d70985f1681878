"""Local Loss Landscape Decomposition: a network's circuits as sparsely active, low-rank directions in weight space.

    decomposition = l3d.decompose(model, data, n_subnetworks=100, rank=8, k=0.1, params="h.4.attn.*", divergence="kl")

Start at `l3d.train`, which holds the loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l3d import callbacks as callbacks
    from l3d import toys as toys
    from l3d.analysis.description import describe as describe
    from l3d.analysis.evaluation import Evaluation as Evaluation
    from l3d.analysis.evaluation import TopSamples as TopSamples
    from l3d.analysis.evaluation import evaluate as evaluate
    from l3d.analysis.evaluation import impact as impact
    from l3d.analysis.evaluation import top_samples as top_samples
    from l3d.analysis.finetune import FineTuned as FineTuned
    from l3d.analysis.finetune import finetune as finetune
    from l3d.analysis.intervention import intervene as intervene
    from l3d.analysis.intervention_ratios import InterventionRatios as InterventionRatios
    from l3d.analysis.intervention_ratios import intervention_ratios as intervention_ratios
    from l3d.analysis.logits import TopLogits as TopLogits
    from l3d.analysis.logits import top_logits as top_logits
    from l3d.analysis.view import View as View
    from l3d.api import Decomposition as Decomposition
    from l3d.api import load as load
    from l3d.api import save as save
    from l3d.gradients.explain import Explanation as Explanation
    from l3d.gradients.explain import explain as explain
    from l3d.gradients.extract import Extractor as Extractor
    from l3d.gradients.extract import extract_gradients as extract_gradients
    from l3d.gradients.factors import Gradients as Gradients
    from l3d.report.report import write_report as write_report
    from l3d.train import decompose as decompose
    from l3d.training.options import PRESETS as PRESETS
    from l3d.training.options import GradientCache as GradientCache
    from l3d.training.options import GradientOptions as GradientOptions
    from l3d.training.options import Memory as Memory
    from l3d.training.options import Preset as Preset
    from l3d.training.options import Replacement as Replacement

__version__ = "0.1.0"

# Public name -> its module, imported on first use: torch takes seconds to import, and `l3d --help` should not.
_HOMES = {
    "Decomposition": "api",
    "Evaluation": "analysis.evaluation",
    "Explanation": "gradients.explain",
    "Extractor": "gradients.extract",
    "FineTuned": "analysis.finetune",
    "GradientCache": "training.options",
    "GradientOptions": "training.options",
    "Gradients": "gradients.factors",
    "InterventionRatios": "analysis.intervention_ratios",
    "Memory": "training.options",
    "PRESETS": "training.options",
    "Preset": "training.options",
    "Replacement": "training.options",
    "TopLogits": "analysis.logits",
    "TopSamples": "analysis.evaluation",
    "View": "analysis.view",
    "decompose": "train",
    "describe": "analysis.description",
    "evaluate": "analysis.evaluation",
    "explain": "gradients.explain",
    "extract_gradients": "gradients.extract",
    "finetune": "analysis.finetune",
    "impact": "analysis.evaluation",
    "intervene": "analysis.intervention",
    "intervention_ratios": "analysis.intervention_ratios",
    "load": "api",
    "save": "api",
    "top_logits": "analysis.logits",
    "top_samples": "analysis.evaluation",
    "write_report": "report.report",
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
