"""Training: data, losses, stage 1 (codec) and stage 2 (entropy model)."""
