"""The embedded model: a small autoencoder and flow transformer."""
