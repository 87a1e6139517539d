"""The ``.pcv2`` file: header, captions and tokens on one rANS stream."""
