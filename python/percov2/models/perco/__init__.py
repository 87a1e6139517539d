"""The backbone with PerCo's Stable Diffusion 2.1."""
