"""Stage 1 on Stable Diffusion 3."""
