"""Project per-sample gradients on low-rank directions.

In come a layer's x and dy (or materialised gradients) with the factors left and right; out go coefficients: all [S, K],
those at kept pairs [N], or the selected ones. Read `project` first: it chooses between `fused` and `chunked`; `at`,
`dense`, `tiled` and `topk` are ops of their own, and `backward`, `at_backward`, `pairs` and `epilogue` are their parts.
"""
