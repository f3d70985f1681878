"""Compute squared norms of gradients, reconstructions and residuals, and the reconstructions themselves.

In come kept coefficients with the directions' factors, or a layer's x and dy; out go one number a sample [S], the Gram
matrix [K, K] or reconstructions [S, O, I]. Read `gram_energy` first; `gram` and `squared_gradient_norm` stand alone,
`reconstruct` launches the kernels of `reconstruct_kernels`.
"""
