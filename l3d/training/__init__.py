"""Turn per-sample gradients into a trained decomposition: settings, steps, restarts, replacements, checkpoints.

In come a model's extractor, data and the caller's options; out come trained `Subnetworks` and files in a run folder.
The loop itself is in `l3d.train`. Read `run.py` first, then `step.py`.
"""
