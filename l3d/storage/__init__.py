"""Save decompositions, checkpoints and run folders to disk, and share them on the Hugging Face hub.

In: a decomposition or a run's figures, and a folder or hub address. Out: safetensors, json and README.md files, or
the objects read from them. Read first: store.py.
"""
