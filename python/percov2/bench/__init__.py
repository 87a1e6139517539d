"""Measurements of the entropy engine, beside its peers and on GPUs: ``percov2 bench``.

docs/benchmarks.md and docs/gpu.md say what each figure means and how it is taken.
"""
