"""Metrics, baselines and reports. Nothing here is imported by the codec."""
