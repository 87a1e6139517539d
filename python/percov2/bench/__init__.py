"""``percov2 bench``: measurements of the entropy engine, its peers and the GPU kernels.

docs/reference/benchmarks.md and docs/how-to/gpu.md explain the figures.
"""
