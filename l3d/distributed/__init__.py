"""Let several processes train one decomposition.

What comes in is a tensor or a decision of each process that torchrun has started. What goes out is the tensors of all
of them gathered or summed, in the same order everywhere, or a message and an exit when one process ends. Read
`process_group` first; `watch` notices processes that have ended.
"""
