"""Select the coefficients of largest magnitude in a batch, by radix selection.

In comes a matrix of coefficients [S, K] and the number n to keep; out go the n kept entries, indexed by row and by
column (SparseCoefficients). Read `batch_topk` first (the launches), then `radix` (the threshold) and `places` (the
order of what is kept).
"""
