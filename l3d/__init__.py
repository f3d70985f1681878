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
    from l3d.gradients.explain import Explanation as Explanation
    from l3d.gradients.explain import explain as explain
    from l3d.gradients.extract import Extractor as Extractor
    from l3d.gradients.extract import extract_gradients as extract_gradients
    from l3d.gradients.factors import Gradients as Gradients
    from l3d.report.report import write_report as write_report
    from l3d.storage.store import save as save
    from l3d.train import decompose as decompose
    from l3d.training.options import PRESETS as PRESETS
    from l3d.training.options import GradientCache as GradientCache
    from l3d.training.options import GradientOptions as GradientOptions
    from l3d.training.options import Memory as Memory
    from l3d.training.options import Preset as Preset
    from l3d.training.options import Replacement as Replacement

__version__ = "0.1.0"

# Module -> its public names, imported on first use: torch takes seconds to import, and `l3d --help` should not.
_NAMES = {
    "analysis.description": ("describe",),
    "analysis.evaluation": ("Evaluation", "TopSamples", "evaluate", "impact", "top_samples"),
    "analysis.finetune": ("FineTuned", "finetune"),
    "analysis.intervention": ("intervene",),
    "analysis.intervention_ratios": ("InterventionRatios", "intervention_ratios"),
    "analysis.logits": ("TopLogits", "top_logits"),
    "analysis.view": ("View",),
    "api": ("Decomposition", "load"),
    "gradients.explain": ("Explanation", "explain"),
    "gradients.extract": ("Extractor", "extract_gradients"),
    "gradients.factors": ("Gradients",),
    "report.report": ("write_report",),
    "storage.store": ("save",),
    "train": ("decompose",),
    "training.options": ("PRESETS", "GradientCache", "GradientOptions", "Memory", "Preset", "Replacement"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
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
