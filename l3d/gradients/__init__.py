"""Extract per-sample gradients from a model and hold them as factors.

What comes in is the user's model and a batch of B rows. What goes out is `Gradients`: for every sample and parameter
the layer input x and the output gradient dy, or a small dense gradient. Read `factors` first, for the data format, then
`extract`.
"""
