"""The networks of the small model as torch modules: training, GPUs, and comparison."""
