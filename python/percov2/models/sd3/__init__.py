"""Stable Diffusion 3 as the painter."""
