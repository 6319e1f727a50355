"""gpt-oss's experts split over the mesh, as a transformers experts function in a PyTorch/XLA program."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.integrations.moe import ExpertsInterface
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

from numina_finetune.config import BATCH_AXES
from numina_finetune.errors import ConfigError
from numina_finetune.models.experts import STATIC_EXPERTS, expert_weight
from numina_finetune.xla.constraints import Constraints
from numina_finetune.xla.jax_programs import JaxPrograms
from numina_finetune.xla.sharding import PartitionSpec, partition_of
from numina_finetune.xla.tally import count

if TYPE_CHECKING:
    from numina_finetune.xla.expert_kernel import Experts

logger = logging.getLogger(__name__)

SPLIT_EXPERTS = "numina_split"
WEIGHTS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def experts_for(wish: str, model_config: PretrainedConfig, *, device_type: str) -> str:
    """What ``--experts`` comes to: ``dropless``, ``capacity`` or ``dense``; ``dense`` for a model that has none.

    Args:
        device_type: as ``torch_xla.runtime.device_type()`` gives it.

    Raises:
        ConfigError: the form asked for cannot be had.
    """
    if not has_experts(model_config):
        return "dense"
    faults = []
    if wish == "dropless" and device_type != "TPU":
        faults.append(f"its kernel is for TPUs, and this is {device_type}: use auto, capacity or dense")
    if wish != "dense" and importlib.util.find_spec("jax") is None:
        faults.append("it is JAX's, which is not installed: pip install 'numina_finetune[tpu]'")
    if wish == "auto":
        if device_type == "TPU" and faults:
            logger.warning("every expert sees every token, which is slow: --experts dropless: %s", "; ".join(faults))
        return "dropless" if device_type == "TPU" and not faults else "dense"
    if faults:
        raise ConfigError([f"--experts {wish}: {fault}" for fault in faults])
    return wish


def has_experts(model_config: PretrainedConfig) -> bool:
    """Whether the model has experts."""
    return bool(getattr(model_config, "num_local_experts", 0))


def use_experts(config: PretrainedConfig, name: str, capacity: float, constraints: Constraints, platform: str) -> None:
    """Let the model of ``config`` compute its experts ``dropless``, by ``capacity`` or ``dense``."""
    if not has_experts(config):
        return
    if name != "dense":
        rule = SplitExperts(constraints, platform, capacity=capacity if name == "capacity" else None)
        ExpertsInterface.register(SPLIT_EXPERTS, rule)
    config._experts_implementation = STATIC_EXPERTS if name == "dense" else SPLIT_EXPERTS


def keep_scores_split(model: nn.Module) -> None:
    """Let routers' scores be taken by comparison.

    The derivative of top-k is a scatter, for which the partitioner gathers the tokens of all chips on each of them
    (1 GB at 256 chips with 4096 tokens each).
    """
    for module in model.modules():
        if isinstance(module, GptOssTopKRouter):
            module.register_forward_hook(_scored_by_comparison)


def _scored_by_comparison(
    router: nn.Module, arguments: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same logits ``[tokens, experts]``, scores and indices ``[tokens, top_k]``, with another way back."""
    logits, _, indices = output
    chosen = indices.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)
    picked = (logits.unsqueeze(1) * chosen.to(logits.dtype)).sum(-1)
    return logits, torch.softmax(picked, dim=-1), indices


class SplitExperts:
    """The same experts as `numina_finetune.models.experts.static_experts`, each on the chips that hold it."""

    def __init__(self, constraints: Constraints, platform: str, *, capacity: float | None) -> None:
        """
        Args:
            platform: ``tpu``; or another, where kernels are interpreted, as plain operations.
            capacity: rows that an expert takes from each chip, over the mean; None = all, whatever the routing.
        """
        self.constraints, self._capacity, self._interpret = constraints, capacity, platform != "tpu"
        self._programs = JaxPrograms(platform)

    @property
    def drops(self) -> bool:
        """Whether an expert may be sent more than it takes."""
        return self._capacity is not None

    def __call__(
        self, module: nn.Module, hidden: torch.Tensor, indices: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        """See `numina_finetune.models.experts.static_experts`; weights come split, as the parameters are."""
        plain = [getattr(module, name) for name in WEIGHTS]
        specs = self._specs(plain)
        weights = [self._effective(module, name, spec) for name, spec in zip(WEIGHTS, specs, strict=True)]
        rows = self.constraints(hidden, "tokens"), self.constraints.place(indices.int(), "tokens")
        mixed: torch.Tensor = _Apply.apply(  # type: ignore[no-untyped-call]
            self, (module.alpha, module.limit, specs), *rows, self.constraints(shares, "tokens"), *weights
        )
        return mixed

    def _effective(self, module: nn.Module, name: str, spec: PartitionSpec) -> torch.Tensor:
        """The weight with what an adapter adds, made where the weight lies."""
        weight: torch.Tensor = getattr(module, name)
        effective = weight if name.endswith("_bias") else expert_weight(module, name)
        return effective if effective is weight else self.constraints.mark(effective, spec)

    def call(self, what: str, shape: tuple[Any, ...], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run ``forward`` or ``backward`` of one layer's experts."""
        return self._programs.call(
            f"experts_{what}", lambda: getattr(self._experts(*shape), what), (what, shape), tensors
        )

    def _experts(self, alpha: float, limit: float, specs: tuple[PartitionSpec, ...]) -> Experts:
        from numina_finetune.xla.expert_kernel import Experts

        return Experts(
            alpha=alpha,
            limit=limit,
            capacity=self._capacity,
            axes=tuple(self.constraints.shape.by_axis.items()),
            batch_axes=BATCH_AXES,
            weight_specs=specs,
            interpret=self._interpret,
        )

    def _specs(self, weights: list[torch.Tensor]) -> tuple[PartitionSpec, ...]:
        shape = self.constraints.shape
        gate_up, gate_up_bias, down, down_bias = (
            partition_of("gpt_oss", f"experts.{name}", tuple(weight.shape), shape)
            for name, weight in zip(WEIGHTS, weights, strict=True)
        )
        if down[1] is None:  # a part of gate and up would have no such part of down to go with
            gate_up, gate_up_bias = (*gate_up[:2], None), (gate_up_bias[0], None)
        return gate_up, gate_up_bias, down, down_bias


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: SplitExperts, shape: tuple[Any, ...], *given: torch.Tensor) -> torch.Tensor:
        ctx.rule, ctx.shape = rule, shape
        ctx.save_for_backward(*given)
        mixed, dropped = rule.call("forward", shape, list(given))
        if rule.drops:
            count(torch.stack([dropped, torch.full_like(dropped, given[1].numel())]))
        return rule.constraints.place(mixed, "tokens")

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        gradient = ctx.rule.constraints.place(gradients[0], "tokens")
        # Computes the layer's experts again: what they make on the way is never kept, under any --remat.
        hidden, shares, *weights = ctx.rule.call("backward", ctx.shape, [*ctx.saved_tensors, gradient])
        hidden, shares = (ctx.rule.constraints.place(part, "tokens") for part in (hidden, shares))
        marked = [ctx.rule.constraints.mark(part, spec) for part, spec in zip(weights, ctx.shape[2], strict=True)]
        return None, None, hidden, None, shares, *marked
