"""The backbone with Stable Diffusion 3."""
