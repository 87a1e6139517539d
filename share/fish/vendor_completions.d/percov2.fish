# Loaded by fish when `percov2` is completed for the first time.
percov2 completion fish 2>/dev/null | source
