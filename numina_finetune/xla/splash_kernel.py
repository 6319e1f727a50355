"""JAX's splash attention as per-chip functions over a mesh: forward with its log-sum-exp, and backward.

Nothing of torch is in here; `numina_finetune.xla.splash` calls it from a PyTorch/XLA program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from numina_finetune.xla.jax_lowering import Axes, on_each_chip

BLOCKS = (512, 256, 128)
"""Sizes of the kernel's blocks of queries and of keys, the first that divides the sequence."""
BLOCKS_OF_KEYS = (1024, *BLOCKS)
"""The same of keys in the backward pass, which adds up one gradient of the queries for each block of keys."""


@dataclass(frozen=True)
class Splash:
    """Attention of one shape, causal within segments.

    The functions take ``query [batch, heads, seq, head_dim]``, ``key`` and ``value`` with ``kv_heads``,
    ``segment_ids [batch, seq]`` and, where the model has them, ``sinks [heads]``.
    """

    length: int
    scale: float
    window: int | None
    """Keys a query reaches back, itself included; None = all."""
    has_sinks: bool
    axes: Axes
    batch_axes: tuple[str, ...]
    head_axis: str
    interpret: bool = False
    """Run the kernel's program as plain operations, on any device."""

    @property
    def forward(self) -> Callable[..., Any]:
        """``(query, key, value, segment_ids[, sinks])`` to the output and ``[batch, heads, seq]`` log-sum-exp."""

        def of_rows(query: Any, key: Any, value: Any, segments: Any, *sinks: Any) -> Any:
            def of_row(q: Any, k: Any, v: Any, s: Any) -> Any:
                kernel = self._kernel(q.shape[0], save_residuals=True)
                output, (sums,) = kernel(
                    self._scaled(q), k, v, segment_ids=kernels.SegmentIds(s, s), sinks=_only(sinks)
                )
                return output, sums

            return jax.vmap(of_row)(query, key, value, segments)

        return on_each_chip(of_rows, self.axes, self._inputs, (self._rows, self._sums))

    @property
    def backward(self) -> Callable[..., Any]:
        """``(query, key, value, segment_ids[, sinks], output, sums, gradient)`` to the inputs' gradients."""

        def of_rows(query: Any, key: Any, value: Any, segments: Any, *others: Any) -> Any:
            *sinks, output, sums, gradient = others

            def of_row(q: Any, k: Any, v: Any, s: Any, o: Any, logsumexp: Any, g: Any) -> Any:
                kernel = self._kernel(q.shape[0], save_residuals=False)
                # The kernel's own rule for autodiff: through jax.vjp it would run the forward kernel once more.
                saved = (
                    *(self._scaled(q), k, v, kernels.SegmentIds(s, s), _only(sinks), o, logsumexp),
                    *(kernel.dq_mask_info, kernel.dkv_mask_info),
                )
                options = kernel.kwargs
                found = kernels._splash_attention_bwd(
                    False,
                    options["mask_value"],
                    options["is_mqa"],
                    options["block_sizes"],
                    options["residual_checkpoint_name"],
                    options["mask_function"],
                    options["attn_logits_soft_cap"],
                    options["interpret"],
                    saved,
                    g,
                )
                return found[3], found[4], found[5], *([found[7]] if sinks else [])

            dq, dk, dv, *by_sinks = jax.vmap(of_row)(query, key, value, segments, output, sums, gradient)
            total = [jax.lax.psum(part.sum(0), self.batch_axes) for part in by_sinks]
            return self._scaled(dq).astype(query.dtype), dk, dv, *total

        sinks = [PartitionSpec(self.head_axis)] if self.has_sinks else []
        inputs = (*self._inputs, self._rows, self._sums, self._rows)
        return on_each_chip(of_rows, self.axes, inputs, (self._rows, self._rows, self._rows, *sinks))

    def _scaled(self, states: Any) -> Any:
        """JAX would round the scale to the type of ``states``."""
        return (states.astype(jnp.float32) * self.scale).astype(states.dtype)

    def _kernel(self, heads: int, *, save_residuals: bool) -> Any:
        shape = self.length, self.length
        mask = masks.CausalMask(shape) if self.window is None else masks.LocalMask(shape, (self.window - 1, 0), 0)
        block = next(size for size in BLOCKS if self.length % size == 0)
        keys = next(size for size in BLOCKS_OF_KEYS if self.length % size == 0)
        return kernels.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            head_shards=1,
            q_seq_shards=1,
            save_residuals=save_residuals,
            block_sizes=kernels.BlockSizes(
                block_q=block,
                block_kv=block,
                block_kv_compute=block,
                block_q_dkv=block,
                block_kv_dkv=keys,
                block_kv_dkv_compute=block,
                use_fused_bwd_kernel=True,
            ),
            interpret=self.interpret,
        )

    @property
    def _rows(self) -> PartitionSpec:
        return PartitionSpec(self.batch_axes, self.head_axis, None, None)

    @property
    def _sums(self) -> PartitionSpec:
        return PartitionSpec(self.batch_axes, self.head_axis, None)

    @property
    def _inputs(self) -> tuple[PartitionSpec, ...]:
        sinks = [PartitionSpec(self.head_axis)] if self.has_sinks else []
        return self._rows, self._rows, self._rows, PartitionSpec(self.batch_axes, None), *sinks


def _only(values: Sequence[Any]) -> Any:
    return values[0] if values else None
