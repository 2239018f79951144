"""What `smolctl quantize` writes: matrices of small integers, their folder, their checkpoint."""
