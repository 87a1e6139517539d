"""PerCo's Stable Diffusion 2.1 as the painter."""
