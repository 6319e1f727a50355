"""Configs, tokenizers and weights: plain torch and transformers."""
