"""Share what every kernel file needs.

In come tensors, a kernel and its arguments; out go launches on the right device, with block sizes from a committed
table, and operators that torch can differentiate and compile. Read `common` first (launch and binding), then `device`
(functions inside kernels).
"""
