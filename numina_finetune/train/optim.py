"""The learning-rate schedule and the parameter groups; the optimizer itself is torch's AdamW."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import torch

from numina_finetune.config import RunConfig


def learning_rate_at(step: int, total_steps: int, config: RunConfig) -> float:
    """Learning rate of the optimizer step that follows ``step`` finished ones.

    A pure function of the step, so that a resumed run needs no scheduler state. Linear warm-up from 0, then cosine
    to 0, linear to 0, or constant (the shapes of transformers' ``get_scheduler``).
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    done = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, 1.0 - done)
    return config.learning_rate * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether the parameter is a matrix, or one for each expert; experts' biases have two dimensions and are none."""
    return parameter.ndim >= 2 and not name.endswith("bias")


def parameter_groups(
    parameters: Mapping[str, torch.nn.Parameter], weight_decay: float, matrices: Container[str] | None = None
) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not.

    Args:
        matrices: names of those that decay, where dimensions do not tell (a stack of norms has two).
    """
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    decay = {name for name, p in trained.items() if (decays(name, p) if matrices is None else name in matrices)}
    return [
        {"params": [p for name, p in trained.items() if name in decay], "weight_decay": weight_decay},
        {"params": [p for name, p in trained.items() if name not in decay], "weight_decay": 0.0},
    ]


def adamw_arguments(config: RunConfig) -> dict[str, Any]:
    """The options that every backend gives to ``torch.optim.AdamW``."""
    return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}


def named_state(parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trained and optimizer tensors under Hugging Face names: what a checkpoint holds.

    Frozen weights are no state: a resume reads them where the run read them first.

    Returns:
        ``{"model": {name: weight}, "optim": {name: {"step", "exp_avg", "exp_avg_sq"}}}``, the live tensors.
    """
    return {
        "model": {name: p.detach() for name, p in parameters.items() if p.requires_grad},
        "optim": {name: optimizer.state[p] for name, p in parameters.items() if p.requires_grad},
    }
