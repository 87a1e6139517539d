"""Measurements of the entropy engine, beside its peers and on GPUs: ``percov2 bench``.

docs/reference/benchmarks.md and docs/how-to/gpu.md say what each figure means and how it is taken.
"""
