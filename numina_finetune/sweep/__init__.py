"""One training tried at several learning rates: planned, run, watched, ranked."""
