"""The XLA SPMD backend: the only package that imports torch_xla, and only when a run asks for it."""
