"""From a PyTorch model to a captured graph."""
