"""Measure and describe a trained decomposition: scores, interventions, contexts, fine-tuning, controls.

In: a decomposition, the model it was trained on, and data. Out: named tuples of figures, and the values of
RUN/subnetworks.json. Read first: evaluation.py.
"""
