"""Answers of a model: engines, sampling, speculation, and the scheduler for many sequences."""
