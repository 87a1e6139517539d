"""Ranges of the numbers in training settings."""

from __future__ import annotations

__all__ = ["MOST_STEPS", "check_above_0", "check_ranges"]

MOST_STEPS = 10**12


def check_ranges(settings: object, **ranges: tuple[float, float]) -> None:
    """Raise ValueError for a setting outside its range, which includes both ends."""
    for name, (low, high) in ranges.items():
        if not low <= (value := getattr(settings, name)) <= high:
            raise ValueError(f"{name} must be {low} to {high}, not {value}")


def check_above_0(settings: object, *names: str) -> None:
    """Raise ValueError for a setting that is not above 0."""
    for name in names:
        if not (value := getattr(settings, name)) > 0:
            raise ValueError(f"{name} must be above 0, not {value}")
