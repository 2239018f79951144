"""What `smolctl quantize` writes: matrices of small integers and their folder."""
