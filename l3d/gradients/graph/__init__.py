"""Read the autograd graph of a forward pass.

What comes in is the model's output with its autograd graph. What goes out is every use of a chosen parameter, where the
rows of the batch lie at each use, and up to where the positions of a sequence stay separate. Read `graph` first.
"""
