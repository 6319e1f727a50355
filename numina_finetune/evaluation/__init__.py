"""Scores: what an answer is, whether it is right, and how often a model gets it right."""

from numina_finetune.evaluation.answers import answers_match, extract_answer

__all__ = ["answers_match", "extract_answer"]
