"""The learning-rate schedule, and the optimizer with its state from the start, the same on every backend."""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping
from typing import Any, Protocol

import torch

from numina_finetune.config import RunConfig
from numina_finetune.train.adafactor import COLUMN, FULL, ROW, Adafactor
from numina_finetune.train.adamw import AdamW
from numina_finetune.train.guarded import GuardedOptimizer, Rounding
from numina_finetune.train.rounding import round_stochastically

Optimizer = GuardedOptimizer | torch.optim.AdamW
"""What makes a run's updates: of our own, or torch's fused AdamW, which has `GuardedOptimizer`'s contract as well."""


def learning_rate_at(step: int, total_steps: int, config: RunConfig) -> float:
    """Learning rate of the optimizer step that follows ``step`` finished ones.

    A pure function of the step, so that a resumed run needs no scheduler state. Linear warm-up that reaches the peak
    with its last step and begins above 0, as a step at rate 0 would be spent on nothing; then cosine to 0 or to
    ``--min-lr-rate`` of the peak, linear to 0, constant, or constant and then linear to 0 over the last
    ``--lr-decay-ratio`` of the steps (wsd). After the warm-up these are the shapes of transformers' ``get_scheduler``.
    """
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if config.lr_scheduler_type == "wsd":
        decay = math.ceil(config.lr_decay_ratio * total_steps)
        return config.learning_rate * max(0.0, min(1.0, (total_steps - step) / max(1, decay)))
    done = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * max(0.0, 1.0 - done)
    left = config.min_lr_rate if config.lr_scheduler_type == "cosine_with_min_lr" else 0.0
    return config.learning_rate * (left + (1.0 - left) * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))))


def warmup_steps(total_steps: int, config: RunConfig) -> int:
    """Optimizer steps of the warm-up."""
    return math.ceil(config.warmup_ratio * total_steps) if config.warmup_steps is None else config.warmup_steps


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
    """Makes an fp32 tensor of an optimizer's state, on the device and split as its parameter."""

    def __call__(self, name: str, dims: tuple[int, ...]) -> torch.Tensor:
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
    fused: bool = False,
    rounding: Rounding = round_stochastically,
) -> Optimizer:
    """The run's optimizer at step 0, for the parameters that are trained.

    Its state is all there, in fp32: a checkpoint loads in place, and the first step is the same program as the second.
    Its learning rate is 0: each step brings its own (`guarded_update`).

    Args:
        zeros: plain torch's if None.
        matrices: names of those that decay and are factored, where dimensions do not tell (see `parameter_groups`).
        stacks: names of those whose first dimension counts layers.
        fused: take torch's fused AdamW where it computes the same, which is where no trained parameter is bf16.
        rounding: of the new values of bf16 parameters.
    """
    groups = parameter_groups(parameters, config.weight_decay, matrices)
    rounded = any(p.requires_grad and p.dtype == torch.bfloat16 for p in parameters.values())
    adam: Any = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    own: Any = {"seed": config.seed, "rounding": rounding}
    optimizer: Optimizer
    if config.optim == "adafactor":
        optimizer = Adafactor(groups, stacks=[parameters[name] for name in stacks], **own)
    elif fused and not rounded:
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True, **adam)
    else:
        optimizer = AdamW(groups, **adam, **own)
    zeros = zeros or _PlainZeros(parameters)
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        factored = decays(name, parameter) if matrices is None else name in matrices
        moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        if config.optim == "adafactor":
            moments = (ROW, COLUMN) if factored else (FULL,)
        optimizer.state[parameter] = {key: zeros(name, kept_dims(key, parameter.ndim)) for key in ("step", *moments)}
    return optimizer


def guarded_update(optimizer: Optimizer, learning_rate: float | torch.Tensor, applied: torch.Tensor) -> None:
    """One step of the optimizer, which changes nothing where ``applied`` (bool scalar on the device) is false."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.grad_scale, optimizer.found_inf = None, 1.0 - applied.float()  # type: ignore[union-attr]
    optimizer.step()


def state_bytes(parameters: Mapping[str, torch.nn.Parameter], config: RunConfig) -> int:
    """Bytes of the optimizer's state over all devices, reckoned from shapes."""
    shapes = {
        name: torch.nn.Parameter(torch.empty(parameter.shape, device="meta"), parameter.requires_grad)
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

    def __call__(self, name: str, dims: tuple[int, ...]) -> torch.Tensor:
        parameter = self._parameters[name].detach()
        if not dims:
            return torch.zeros((), device=parameter.device)
        if len(dims) == parameter.ndim:
            return torch.zeros_like(parameter, dtype=torch.float32)
        shape = [parameter.shape[dim] for dim in dims]
        return parameter.new_zeros(shape, dtype=torch.float32)  # sharded parameters too


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
