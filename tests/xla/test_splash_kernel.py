"""JAX's kernel, interpreted on a CPU, is the attention that the plain torch form computes; and it is one for TPUs."""

from __future__ import annotations

import os
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from numina_finetune.models.attention import segment_attention
from tests.reference import kernels_multiply_fp32

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax", reason="the kernel is JAX's, which is not installed")

BATCH, HEADS, KV_HEADS, LENGTH, SIZE = 2, 4, 2, 256, 64
AXES = (("fsdp", 1), ("tensor", 1))


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from numina_finetune.xla import splash_kernel

    return splash_kernel


def splash(kernels: ModuleType, window: int | None, sinks: bool, **changes: Any) -> Any:
    options = {"axes": AXES, "batch_axes": ("fsdp",), "head_axis": "tensor", "interpret": True, **changes}
    return kernels.Splash(length=LENGTH, scale=SIZE**-0.5, window=window, has_sinks=sinks, **options)


def attention_inputs(sinks: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """Query, key, value, segments, perhaps sinks; and the gradient of the output."""
    rng = np.random.default_rng(0)
    states = [rng.standard_normal((BATCH, n, LENGTH, SIZE), np.float32) for n in (HEADS, KV_HEADS, KV_HEADS)]
    segments = np.ones((BATCH, LENGTH), np.int32)
    segments[:, 100:] = 2
    segments[1, 200:] = 0
    extra = [rng.standard_normal(HEADS, np.float32)] if sinks else []
    return [*states, segments, *extra], rng.standard_normal((BATCH, HEADS, LENGTH, SIZE), np.float32)


@pytest.mark.parametrize(
    ("window", "sinks"),
    [(None, False), (37, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((37, False), (None, True)))],
)
def test_output_and_gradients_are_those_of_the_torch_form(kernels: ModuleType, window: int | None, sinks: bool) -> None:
    inputs, gradient = attention_inputs(sinks)
    kernel = splash(kernels, window, sinks)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))
    with mesh:
        output, sums = jax.jit(kernel.forward)(*inputs)
        gradients = jax.jit(kernel.backward)(*inputs, output, sums, gradient)

    tensors = [torch.from_numpy(array).requires_grad_(array.dtype == np.float32) for array in inputs]
    query, key, value, segments, *extra = tensors
    expected, _ = segment_attention(
        SimpleNamespace(),  # type: ignore[arg-type]
        *(query, key, value, None),
        segment_ids=segments,
        sliding_window=window,
        s_aux=extra[0] if extra else None,
    )
    expected = expected.transpose(1, 2)
    torch.autograd.backward(expected, torch.from_numpy(gradient))
    references = [expected.detach(), *(tensor.grad for tensor in (query, key, value, *extra))]
    for found, reference in zip((output, *gradients), references, strict=True):
        difference = torch.from_numpy(np.array(found)) - reference
        assert difference.norm() / reference.norm() < 2e-6


@pytest.mark.parametrize(("window", "sinks", "dtype"), [(None, False, "float32"), (128, True, "bfloat16")])
def test_forward_and_backward_lower_for_a_mesh_of_tpus_with_products_of_their_type(
    kernels: ModuleType, window: int | None, sinks: bool, dtype: str
) -> None:
    from numina_finetune.xla.jax_lowering import lower

    axes = (("fsdp", 4), ("tensor", 2))
    kernel = splash(kernels, window, sinks, axes=axes, interpret=False)
    rows, few = (8, HEADS, LENGTH, SIZE), (8, KV_HEADS, LENGTH, SIZE)
    shapes = [(rows, dtype), (few, dtype), (few, dtype), ((8, LENGTH), "int32")]
    shapes += [((HEADS,), dtype)] if sinks else []
    saved = [(rows, dtype), (rows[:3], "float32"), (rows, dtype)]
    programs = [lower(kernel.forward, shapes, "tpu"), lower(kernel.backward, [*shapes, *saved], "tpu")]
    for program in programs:
        (multiplies_fp32,) = kernels_multiply_fp32(program.decode("latin-1"))
        assert multiplies_fp32 == (dtype == "float32")


def test_the_scale_is_not_rounded_to_the_type_of_the_queries(kernels: ModuleType) -> None:
    """In bf16, 96 ** -0.5 would be 0.17 % too large."""
    rng = np.random.default_rng(0)
    query = jax.numpy.asarray(rng.standard_normal((64, 96)), jax.numpy.bfloat16)
    found = kernels.Splash(64, 96**-0.5, None, False, AXES, ("fsdp",), "tensor")._scaled(query)
    expected = (np.asarray(query, np.float32) * np.float32(96**-0.5)).astype(found.dtype)
    assert (np.asarray(found) == expected).all()
