"""The learning-rate schedule, and the optimizer with its state from the start, the same on every backend."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping
from typing import Any, Protocol

import torch

from numina_finetune.config import RunConfig
from numina_finetune.train.adafactor import COLUMN, FULL, ROW, Adafactor


def learning_rate_at(step: int, total_steps: int, config: RunConfig) -> float:
    """Learning rate of the optimizer step that follows ``step`` finished ones.

    A pure function of the step, so that a resumed run needs no scheduler state. Linear warm-up from 0, then cosine
    to 0, linear to 0, constant, or constant and then linear to 0 over the last ``--lr-decay-ratio`` of the steps (wsd;
    the shapes of transformers' ``get_scheduler``).
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if config.lr_scheduler_type == "wsd":
        decay = math.ceil(config.lr_decay_ratio * total_steps)
        return config.learning_rate * max(0.0, min(1.0, (total_steps - step) / max(1, decay)))
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


class Zeros(Protocol):
    """Makes a tensor of an optimizer's state, on the device and split as its parameter."""

    def __call__(self, name: str, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """
        Args:
            name: of the parameter.
            dims: those of the parameter that the tensor has.
        """


def make_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    config: RunConfig,
    *,
    zeros: Zeros | None = None,
    matrices: Container[str] | None = None,
    stacks: Collection[str] = (),
    **form: bool,
) -> torch.optim.Optimizer:
    """The run's optimizer at step 0, for the parameters that are trained.

    Its state is all there: a checkpoint loads in place, and the first step is the same program as the second. Its
    learning rate is 0: each step brings its own.

    Args:
        zeros: plain torch's if None.
        matrices: names of those that decay and are factored, where dimensions do not tell (see `parameter_groups`).
        stacks: names of those whose first dimension counts layers.
        form: which of torch's implementations of AdamW, such as ``fused``.
    """
    groups = parameter_groups(parameters, config.weight_decay, matrices)
    if config.optim == "adafactor":
        optimizer: torch.optim.Optimizer = Adafactor(groups, stacks=[parameters[name] for name in stacks])
    else:
        betas = config.adam_beta1, config.adam_beta2
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.adam_epsilon, **form)
    zeros = zeros or _PlainZeros(parameters)
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        factored = decays(name, parameter) if matrices is None else name in matrices
        if config.optim == "adafactor":
            moments, dtype = (ROW, COLUMN) if factored else (FULL,), torch.float32
        else:
            moments, dtype = ("exp_avg", "exp_avg_sq"), parameter.dtype
        optimizer.state[parameter] = {
            key: zeros(name, kept_dims(key, parameter.ndim), torch.float32 if key == "step" else dtype)
            for key in ("step", *moments)
        }
    return optimizer


def state_bytes(parameters: Mapping[str, torch.nn.Parameter], config: RunConfig, dtype: torch.dtype) -> int:
    """Bytes of the optimizer's state over all devices, reckoned from shapes.

    Args:
        dtype: in which the parameters are trained.
    """
    shapes = {
        name: torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="meta"), parameter.requires_grad)
        for name, parameter in parameters.items()
    }
    states = make_optimizer(shapes, config).state.values()
    return sum(tensor.nbytes for state in states for tensor in state.values())


def kept_dims(key: str, ndim: int) -> tuple[int, ...]:
    """Which of a parameter's ``ndim`` dimensions the tensor ``key`` of its optimizer state has."""
    every = tuple(range(ndim))
    return {"step": (), ROW: every[:-1], COLUMN: every[:-2] + every[-1:]}.get(key, every)


class _PlainZeros:
    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._parameters = parameters

    def __call__(self, name: str, dims: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        parameter = self._parameters[name].detach()
        if not dims:
            return torch.zeros((), dtype=dtype, device=parameter.device)
        if len(dims) == parameter.ndim:
            return torch.zeros_like(parameter, dtype=dtype)
        return parameter.new_zeros([parameter.shape[dim] for dim in dims], dtype=dtype)  # sharded parameters too


def named_state(parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trained and optimizer tensors under Hugging Face names: what a checkpoint holds.

    Frozen weights are no state: a resume reads them where the run read them first.

    Returns:
        ``{"model": {name: weight}, "optim": {name: {"step", "exp_avg", …}}}``, the live tensors.
    """
    return {
        "model": {name: p.detach() for name, p in parameters.items() if p.requires_grad},
        "optim": {name: optimizer.state[p] for name, p in parameters.items() if p.requires_grad},
    }
