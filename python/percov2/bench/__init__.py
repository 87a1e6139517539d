"""Measurements of the entropy engine, also beside its peers: ``percov2 bench entropy``.

docs/benchmarks.md says what each figure means and how it is taken.
"""
