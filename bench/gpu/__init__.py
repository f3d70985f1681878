"""The kernels on one GPU: correct, then timed beside what bounds them. `python3 -m bench.gpu` (from source)."""
