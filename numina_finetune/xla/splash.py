"""Splash attention, JAX's kernel for TPUs, as a transformers attention function in a PyTorch/XLA program."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig

from numina_finetune.config import BATCH_AXES
from numina_finetune.errors import ConfigError
from numina_finetune.mesh import MeshShape
from numina_finetune.models.attention import SEGMENT_ATTENTION, dropout_faults
from numina_finetune.xla.constraints import Constraints
from numina_finetune.xla.jax_programs import JaxPrograms
from numina_finetune.xla.remat import keep

if TYPE_CHECKING:
    from numina_finetune.xla.splash_kernel import Splash

logger = logging.getLogger(__name__)

SPLASH_ATTENTION = "numina_splash"
LENGTH_MULTIPLE = 128
HEAD_MULTIPLE = 64


def attention_for(wish: str, model_config: PretrainedConfig, length: int, shape: MeshShape, *, device_type: str) -> str:
    """What ``--attention`` comes to: ``splash`` or ``torch``.

    Args:
        device_type: as ``torch_xla.runtime.device_type()`` gives it.

    Raises:
        ConfigError: the kernel is asked for and cannot be had.
    """
    if wish == "torch":
        return "torch"
    faults = _faults(model_config, length, shape, device_type)
    if not faults:
        return "splash"
    if wish == "splash":
        raise ConfigError([f"--attention splash: {fault}" for fault in faults])
    if device_type == "TPU":
        logger.warning("attention without a kernel, which is slow and takes memory: %s", "; ".join(faults))
    return "torch"


def _faults(model_config: PretrainedConfig, length: int, shape: MeshShape, device_type: str) -> list[str]:
    faults = []
    if device_type != "TPU":
        faults.append(f"the kernel is for TPUs, and this is {device_type}: use auto or torch")
    elif importlib.util.find_spec("jax") is None:
        faults.append("the kernel is JAX's, which is not installed: pip install 'numina_finetune[tpu]'")
    if length % LENGTH_MULTIPLE:
        faults.append(f"--max-seq-length {length} is no multiple of {LENGTH_MULTIPLE}")
    heads, kv_heads = model_config.num_attention_heads, model_config.num_key_value_heads
    size = getattr(model_config, "head_dim", None) or model_config.hidden_size // heads
    if size % HEAD_MULTIPLE:
        faults.append(f"the model's heads have {size} dimensions, no multiple of {HEAD_MULTIPLE}")
    if heads % shape.tensor or kv_heads % shape.tensor:
        faults.append(f"tensor={shape.tensor} does not divide the model's {heads} heads and {kv_heads} of keys")
    return [*faults, *dropout_faults(model_config)]


def use_attention(config: PretrainedConfig, name: str, constraints: Constraints, platform: str) -> None:
    """Let the model of ``config`` attend by ``splash`` or ``torch``."""
    if name == "splash":
        AttentionInterface.register(SPLASH_ATTENTION, SplashAttention(constraints, platform))
    config._attn_implementation = SPLASH_ATTENTION if name == "splash" else SEGMENT_ATTENTION


class SplashAttention:
    """The same attention as `numina_finetune.models.attention.segment_attention`, in a kernel."""

    def __init__(self, constraints: Constraints, platform: str) -> None:
        """
        Args:
            platform: ``tpu``; or another, where the kernel is interpreted, as plain operations.
        """
        self.constraints, self._interpret = constraints, platform != "tpu"
        self._programs = JaxPrograms(platform)

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        segment_ids: torch.Tensor,
        scaling: float | None = None,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `numina_finetune.models.attention.segment_attention`; without dropout, see :func:`attention_for`."""
        sinks = [] if s_aux is None else [s_aux]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = [self.constraints(states.to(value.dtype), "heads") for states in (query, key, value)]
        output: torch.Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
            self, scale, sliding_window, *rows, segment_ids, *sinks
        )
        return output.transpose(1, 2).contiguous(), None

    def call(self, what: str, shape: tuple[Any, ...], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Run the kernel ``forward`` or ``backward`` of one shape."""
        return self._programs.call(
            f"splash_{what}", lambda: getattr(self._kernel(*shape), what), (what, shape), tensors
        )

    def _kernel(self, length: int, scale: float, window: int | None, has_sinks: bool) -> Splash:
        from numina_finetune.xla.splash_kernel import Splash

        return Splash(
            length=length,
            scale=scale,
            window=window,
            has_sinks=has_sinks,
            axes=tuple(self.constraints.shape.by_axis.items()),
            batch_axes=BATCH_AXES,
            head_axis="tensor",
            interpret=self._interpret,
        )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: SplashAttention, scale: float, window: int | None, query: torch.Tensor, *others: torch.Tensor
    ) -> torch.Tensor:
        shape = query.shape[2], scale, window, len(others) == 4
        output, sums = rule.call("forward", shape, [query, *others])
        output, sums = keep(rule.constraints.place(output, "heads")), keep(rule.constraints.place(sums, "sums"))
        ctx.rule, ctx.shape = rule, shape
        ctx.save_for_backward(query, *others, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        gradient = ctx.rule.constraints.place(gradients[0], "heads")
        found = ctx.rule.call("backward", ctx.shape, [*ctx.saved_tensors, gradient])
        by_rows = [ctx.rule.constraints.place(part, "heads") for part in found[:3]]
        return None, None, None, *by_rows, None, *found[3:]
