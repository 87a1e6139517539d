"""Metrics, baselines and reports. The codec does not import this package."""
