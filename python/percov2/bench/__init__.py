"""``percov2 bench``: measurements of the entropy engine, its peers and the GPU kernels.

docs/benchmarks.md and docs/gpu.md explain the figures.
"""
