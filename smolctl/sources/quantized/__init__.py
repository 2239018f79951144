"""Quantized matrices in memory: small integers with their scales."""
