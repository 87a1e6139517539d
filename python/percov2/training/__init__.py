"""Training commands of the package: data, losses, stage 1 (codec) and stage 2 (entropy model)."""
