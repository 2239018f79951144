"""The network in PyTorch, and its weights."""
