"""The entropy engine in torch: training, other executors, GPUs."""
