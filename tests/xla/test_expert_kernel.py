"""The per-chip experts, interpreted on a CPU, are those of the plain torch form, whatever the routing sends them."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from numina_finetune.config import BATCH_AXES, MESH_AXES
from numina_finetune.mesh import MeshShape
from numina_finetune.models.experts import static_experts
from numina_finetune.plan.costs import AS_NEEDED
from numina_finetune.xla.sharding import partition_of
from tests.reference import fill_randomly, gpt_oss_config, kernels_multiply_fp32

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax", reason="the kernels are JAX's, which is not installed")

TOKENS, EXPERTS, TOP_K = 64, 8, 4
WEIGHTS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from numina_finetune.xla import expert_kernel

    return expert_kernel


def routing(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """``[tokens, top_k]`` experts and their shares: even, or all tokens to the same four."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(EXPERTS)[:TOP_K] if kind == "even" else np.arange(TOP_K) for _ in range(TOKENS)]
    shares = rng.random((TOKENS, TOP_K), np.float32)
    return np.stack(rows).astype(np.int32), shares / shares.sum(1, keepdims=True)


def module() -> GptOssExperts:
    experts = GptOssExperts(gpt_oss_config(EXPERTS))
    fill_randomly(experts)
    return experts


def given_to(experts: GptOssExperts, kind: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The functions' arguments, and a gradient of their result."""
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((TOKENS, experts.hidden_size), np.float32)
    weights = [getattr(experts, name).detach().numpy() for name in WEIGHTS]
    return [hidden, *routing(kind), *weights], rng.standard_normal(hidden.shape, np.float32)


def kernel(kernels: ModuleType, experts: GptOssExperts, shape: MeshShape, **changes: Any) -> Any:
    options = {"capacity": None, "interpret": True, **changes}
    return kernels.Experts(
        alpha=experts.alpha,
        limit=experts.limit,
        axes=tuple(shape.by_axis.items()),
        batch_axes=BATCH_AXES,
        weight_specs=tuple(
            partition_of("gpt_oss", f"experts.{name}", tuple(getattr(experts, name).shape), shape) for name in WEIGHTS
        ),
        **options,
    )


def results(one: Any, inputs: list[np.ndarray], gradient: np.ndarray) -> tuple[list[np.ndarray], float]:
    """The output and the gradients of all inputs but the indices, and how many assignments were dropped."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape([1] * len(MESH_AXES)), MESH_AXES)
    with mesh:
        output, dropped = jax.jit(one.forward)(*inputs)
        gradients = jax.jit(one.backward)(*inputs, gradient)
    return [np.array(output), *map(np.array, gradients)], float(dropped)


def expected(experts: GptOssExperts, inputs: list[np.ndarray], gradient: np.ndarray) -> list[np.ndarray]:
    hidden, shares = (torch.from_numpy(inputs[place]).requires_grad_() for place in (0, 2))
    output = static_experts(experts, hidden, torch.from_numpy(inputs[1]).long(), shares)
    torch.autograd.backward(output, torch.from_numpy(gradient))
    found = [output.detach(), hidden.grad, shares.grad, *(getattr(experts, name).grad for name in WEIGHTS)]
    return [tensor.numpy() for tensor in found if tensor is not None]


def furthest(found: list[np.ndarray], reference: list[np.ndarray]) -> float:
    return max(
        float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in zip(found, reference, strict=True)
    )


@pytest.mark.parametrize("capacity", [None, EXPERTS])
@pytest.mark.parametrize("kind", [pytest.param("even", marks=pytest.mark.slow), "skewed"])
def test_output_and_gradients_are_those_of_the_torch_form(
    kernels: ModuleType, kind: str, capacity: float | None
) -> None:
    experts = module()
    inputs, gradient = given_to(experts, kind)
    found, dropped = results(kernel(kernels, experts, MeshShape(), capacity=capacity), inputs, gradient)
    assert furthest(found, expected(experts, inputs, gradient)) < 2e-6
    assert dropped == 0


@pytest.mark.parametrize("kind", [pytest.param("even", marks=pytest.mark.slow), "skewed"])
def test_rows_beyond_one_block_are_computed_as_well(
    kernels: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "TILES", (16, 1024, 1024))
    experts = module()
    inputs, gradient = given_to(experts, kind)
    one = kernel(kernels, experts, MeshShape())
    whole = kernels._Rows.of

    def in_blocks(chosen: Any, own: int, size: int) -> Any:
        return whole(chosen, own, 48)  # of 256 rows: the last block is not full

    monkeypatch.setattr(kernels._Rows, "of", staticmethod(in_blocks))
    found, _ = results(one, inputs, gradient)
    assert furthest(found, expected(experts, inputs, gradient)) < 2e-6


def test_an_expert_over_its_capacity_drops_its_last_assignments_and_says_how_many(kernels: ModuleType) -> None:
    experts = module()
    inputs, gradient = given_to(experts, "skewed")
    capacity = 1.0  # 32 of the 64 rows that each of four experts is sent, in the order of tokens
    found, dropped = results(kernel(kernels, experts, MeshShape(), capacity=capacity), inputs, gradient)
    assert dropped == TOKENS * TOP_K / 2
    kept = [inputs[0], inputs[1], np.where(np.arange(TOKENS)[:, None] < TOKENS // 2, inputs[2], 0), *inputs[3:]]
    reference = expected(module_like(experts), kept, gradient)
    reference[2] = np.where(np.arange(TOKENS)[:, None] < TOKENS // 2, reference[2], 0)
    assert furthest(found, reference) < 2e-6


def module_like(experts: GptOssExperts) -> GptOssExperts:
    other = GptOssExperts(gpt_oss_config(EXPERTS))
    other.load_state_dict(experts.state_dict())
    return other


def test_the_loop_over_further_blocks_has_the_name_that_plan_knows(kernels: ModuleType) -> None:
    assert kernels.AS_NEEDED == AS_NEEDED


@pytest.mark.parametrize(("capacity", "dtype"), [(None, "bfloat16"), (None, "float32"), (1.25, "bfloat16")])
def test_forward_and_backward_lower_for_a_mesh_of_tpus_with_products_of_their_type(
    kernels: ModuleType, capacity: float | None, dtype: str
) -> None:
    from numina_finetune.xla.jax_lowering import lower

    shape, config = MeshShape(fsdp=2, expert=2, tensor=2), gpt_oss_config(EXPERTS)
    experts = GptOssExperts(config)
    one = kernel(kernels, experts, shape, capacity=capacity, interpret=False)
    rows = [((512, 64), dtype), ((512, TOP_K), "int32"), ((512, TOP_K), "float32")]
    weights = [(tuple(getattr(experts, name).shape), dtype) for name in WEIGHTS]
    forward, backward = (
        lower(one.forward, [*rows, *weights], "tpu"),
        lower(one.backward, [*rows, *weights, rows[0]], "tpu"),
    )
    for program in (forward, backward):
        multiply_fp32 = kernels_multiply_fp32(program.decode("latin-1"))
        assert set(multiply_fp32) == (set() if capacity else {dtype == "float32"})
