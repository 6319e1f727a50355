"""What the TPU's own compiler makes of matrix products that are promised in fp32.

Numbers of a CPU cannot show it: there, products are made in their operands' type whatever is asked for.
"""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from numina_finetune.config import RunConfig
from numina_finetune.mesh import parse_mesh
from numina_finetune.plan.compilation import Candidate, Fitted, TpuCompiler
from numina_finetune.plan.geometry import geometry_of
from numina_finetune.plan.hlo import parse
from numina_finetune.tpu import parse_tpu
from tests.reference import kernels_multiply_fp32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra `plan`, is not here"),
]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
"""Heads that the attention kernel takes."""


@dataclass(frozen=True)
class Product:
    """A matrix product of the optimised program."""

    module: str
    operands: tuple[str, ...]
    """Their types."""
    result: str
    exact: bool
    """Made of the operands as they are; else a TPU rounds those of fp32 to bf16."""


@dataclass(frozen=True)
class Step:
    """A training step as the TPU runs it."""

    products: list[Product]
    kernels: list[bool]
    """Of each, whether it multiplies fp32 in fp32."""


def compiled(folder: Path, model: str, precision: str, layers: dict[str, Any]) -> Step:
    """The step of a small model on one chip of a v5e."""
    config = RunConfig(
        model_name=model, precision=precision, max_seq_length=128, per_device_train_batch_size=1, experts="auto"
    )
    tpu = parse_tpu("v5litepod-1")
    compiler = TpuCompiler(tpu, {**geometry_of(config), **SMALL, **layers}, folder)
    outcome = compiler(Candidate(config, parse_mesh("fsdp=1", 1)))
    assert isinstance(outcome, Fitted)
    (path,) = folder.glob("*.hlo.gz")
    text = gzip.decompress(path.read_bytes()).decode()
    products = []
    for computation in parse(text).computations.values():
        for one in computation:
            if one.opcode in ("dot", "convolution"):
                operands = [computation.operand(one, number) for number in (0, 1)]
                types = tuple(operand.arrays[0].dtype for operand in operands if operand is not None)
                exact = "operand_precision={highest,highest}" in one.attributes
                products.append(Product(one.op_name, types, one.arrays[0].dtype, exact))
    return Step(products, kernels_multiply_fp32(text))


def test_a_step_in_fp32_multiplies_nothing_in_bf16(tmp_path: Path) -> None:
    step = compiled(tmp_path, "tiny-qwen3", "fp32", {"layer_types": ["full_attention"] * 2})
    assert len(step.products) >= 4 * 7, "seven matrices of a layer: forward, again, and backward twice"
    assert {(one.operands, one.result, one.exact) for one in step.products} == {(("f32", "f32"), "f32", True)}
    assert len(step.kernels) == 3 and all(step.kernels), "attention: forward, again, and backward"


def test_routers_multiply_in_fp32_in_a_step_that_computes_in_bf16(tmp_path: Path) -> None:
    step = compiled(tmp_path, "tiny-gpt-oss", "bf16", {"layer_types": ["sliding_attention", "full_attention"]})
    routers = [one for one in step.products if "mlp.router" in one.module]
    assert len(routers) >= 2 * 4, "of two layers: forward, again, and backward twice"
    # Where hidden states are read as they are, in bf16, they are an operand of fp32 all the same.
    assert all(one.exact and one.result == "f32" and "f32" in one.operands for one in routers)
    others = [one for one in step.products if "mlp.router" not in one.module]
    assert others and not any("f32" in one.operands for one in others)
    assert step.kernels and not any(step.kernels)
