"""The web page of ``percov2 demo``: compress a photo, look at it, and restore it."""
