"""Metrics, baselines and reports. The codec imports none of them."""
