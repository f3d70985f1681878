"""Let several processes train one decomposition.

What comes in is a tensor of each process that torchrun has started, or a decision of the first process. What goes out
is, on every process, the tensors gathered or summed in one order, or the decision; if a process ends, the others print
how to resume and exit. Read `process_group` first.
"""
