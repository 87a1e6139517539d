"""Training of the methods that the entropy study compares."""
