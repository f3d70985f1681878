"""The room topk."""
