"""JAX functions of one chip each, over a mesh that is not at hand, and as serialized HLO.

Nothing of torch is in here; `numina_finetune.xla.jax_programs` calls it from a PyTorch/XLA program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.interpreters import mlir
from jax.sharding import AbstractMesh, PartitionSpec

Axes = tuple[tuple[str, int], ...]
"""A mesh: names and sizes."""


def on_each_chip(
    function: Callable[..., Any], axes: Axes, inputs: Sequence[PartitionSpec], outputs: Sequence[PartitionSpec]
) -> Callable[..., Any]:
    """``function`` of one chip's parts as a function of whole arrays."""
    mesh = AbstractMesh(tuple(size for _, size in axes), tuple(name for name, _ in axes))
    mapped: Callable[..., Any] = jax.shard_map(
        function, mesh=mesh, in_specs=tuple(inputs), out_specs=tuple(outputs), check_vma=False
    )
    return mapped


def lower(function: Callable[..., Any], kinds: Sequence[tuple[tuple[int, ...], str]], platform: str) -> bytes:
    """``function`` for arguments of these shapes and types as a serialized HLO module.

    The first argument is the activations: where they are fp32, so are all matrix products, those of kernels too. By
    default a TPU makes them of bf16 parts. Kernels cannot be told so of bf16 operands.
    """
    given = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in kinds]
    # As if for export: kernels are then written in a version that the pinned libtpu reads. Today's newest one
    # (8, "expected <= 7") it does not, and without a TPU at hand JAX writes that.
    parameters = mlir.LoweringParameters(for_export=True)
    with jax.default_matmul_precision("highest" if given[0].dtype == jnp.float32 else "default"):
        traced = jax.jit(function, keep_unused=True).trace(*given)
    lowered = traced.lower(lowering_platforms=(platform,), _private_parameters=parameters)
    module: bytes = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
    return module
