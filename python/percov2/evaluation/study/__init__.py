"""Entropy schedules and coders compared on held-out tokens."""
