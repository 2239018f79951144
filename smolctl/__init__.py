"""smolctl: one toolkit that takes a small language model from a config to a public demo."""

__version__ = "0.1.0"
