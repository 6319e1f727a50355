"""A run, all its lives, on one page."""
