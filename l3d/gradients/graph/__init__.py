"""Read the autograd graph of a forward pass.

What comes in is the model's output with its autograd graph. What goes out is every use of a chosen parameter, the
layout of the batch's rows at each use, and how far down the graph the positions of a sequence stay separate. Read
`graph` first.
"""
