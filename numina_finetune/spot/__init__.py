"""Spot TPUs: a supervisor that keeps a training alive until it is done, and leaks no machine."""
