"""Comparison of entropy schedules and coders on held-out tokens."""
