"""Damaged and hostile inputs of every kind, each a pure function of its kind and number.

`python -m tests.fuzz --count 100000` runs many, `python -m tests.fuzz config:4711` shows one alone.
"""
