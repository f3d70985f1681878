"""Local Loss Landscape Decomposition: a network's circuits as sparsely active, low-rank directions in weight space.

    decomposition = l3d.decompose(model, data, n_subnetworks=100, rank=8, k=0.1, params="h.4.attn.*", divergence="kl")

Start at `l3d.train`, where the whole flow stands on one screen.
"""

from l3d import toys
from l3d.decomposition import Decomposition
from l3d.evaluate import Evaluation, TopSamples, evaluate, impact, top_samples
from l3d.extract import Extractor, extract_gradients
from l3d.factors import Gradients
from l3d.intervene import intervene
from l3d.store import load, save
from l3d.train import decompose

__version__ = "0.1.0"

__all__ = [
    "Decomposition",
    "Evaluation",
    "Extractor",
    "Gradients",
    "TopSamples",
    "decompose",
    "evaluate",
    "extract_gradients",
    "impact",
    "intervene",
    "load",
    "save",
    "top_samples",
    "toys",
]
