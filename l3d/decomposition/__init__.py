"""Hold subnetworks as low-rank directions, and compute coefficients, loss and derivatives from per-sample gradients.

In come gradients as factors (`l3d.gradients`); out come coefficients [S, K], kept pairs, the loss of a batch and its
derivatives. Read `subnetworks.py` first, then `objective.py`.
"""
