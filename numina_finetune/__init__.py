"""Supervised fine-tuning of language models for mathematics on spot TPUs, with PyTorch/XLA and Accelerate."""

__version__ = "0.1.0"
