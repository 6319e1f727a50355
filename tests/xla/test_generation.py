"""On the mesh, greedy tokens are transformers' own, drawn ones those of a plain decoder, and two programs make them."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

from numina_finetune.plan.hlo import Program, parse
from tests.conftest import environment
from tests.decoding import NEW_TOKENS, TIE
from tests.programs import run_module
from tests.reference import VOCABULARY

ROWS = 4
"""Of a batch: the three that are asked for, filled up."""
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
MOST = ROWS * max(VOCABULARY, 8 * 2 * 32)
"""Values: the rows' scores, or what they have inside all eight experts."""
BUCKETS = 2
"""Padded widths that the prompts come to, in batches of four: 128 and 256."""
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="the kernels are JAX's")


CASES = [
    (4, "fsdp=2,tensor=2", ["qwen3-windows,scan,sampled"]),
    pytest.param((4, "fsdp=2,expert=2", ["gpt-oss,scan,dropless"]), marks=needs_jax),
    pytest.param((4, "fsdp=4", ["qwen3,scan"]), marks=pytest.mark.slow),
    pytest.param((4, "fsdp=4", ["gpt-oss,unrolled,lora"]), marks=pytest.mark.slow),
    pytest.param((1, "fsdp=1", ["qwen3,scan", "gpt-oss,scan,sampled"]), marks=pytest.mark.slow),
    pytest.param((4, "fsdp=2,tensor=2", ["gpt-oss,scan,lora"]), marks=pytest.mark.slow),
    pytest.param((4, "fsdp=2,tensor=2", ["qwen3-windows,unrolled,sampled"]), marks=pytest.mark.slow),
    pytest.param(
        (4, "data=2,expert=2", ["gpt-oss,scan,capacity", "gpt-oss,scan,splash,sampled"]),
        marks=[pytest.mark.slow, needs_jax],
    ),
]


@dataclass(frozen=True)
class Generated:
    """What one process says of its cases, and the optimised programs that it ran."""

    cases: dict[str, dict[str, Any]]
    programs: list[Program]
    asked: list[str]
    """The same before the compiler saw them."""


@pytest.fixture(scope="module", params=CASES, ids=str)
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Generated:
    devices, mesh, cases = request.param
    folder = tmp_path_factory.mktemp("programs")
    dumped = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    env = environment(devices=devices, JAX_PLATFORMS="cpu", XLA_FLAGS=dumped)
    result = run_module("tests.xla.generation", mesh, *cases, env=env, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    texts = [path.read_text("utf-8") for path in folder.glob("*after_optimizations.txt")]
    asked = [path.read_text("utf-8") for path in folder.glob("*before_optimizations.txt")]
    return Generated(json.loads(result.stdout.splitlines()[-1]), [parse(text) for text in texts], asked)


def test_tokens_are_those_of_transformers_from_two_programs_for_each_width(generated: Generated) -> None:
    for case, found in generated.cases.items():
        assert all(gap < TIE for gap in found["gaps"]), (case, found)
        assert len(found["gaps"]) <= 1, (case, found)
        assert found["compilations"] == 2 * BUCKETS, case
        assert found["changed"] == ("sampled" in case), "another seed draws other tokens, with the same programs"


def test_for_a_token_no_weight_travels_and_the_cache_is_written_in_place(generated: Generated) -> None:
    decoding = [program for program in generated.programs if program.aliased_outputs]
    assert len(decoding) == BUCKETS * len(generated.cases)
    for program in decoding:
        travelling = [
            math.prod(array.dims)
            for computation in program.computations.values()
            for one in computation
            if one.opcode in COLLECTIVES
            for array in one.arrays
        ]
        assert max(travelling, default=0) <= MOST, "less than any weight that is a matrix"
        held = [program.entry.parameters[into] for into in program.aliased_outputs.values()]
        cache = max(held, key=lambda one: one.bytes)
        assert cache.arrays[0].dims[-2] > NEW_TOKENS
        copies = [one for one in program.entry if one.opcode == "copy" and one.arrays[0].dims == cache.arrays[0].dims]
        # Of layers that are no loop the CPU's compiler copies it first.
        assert copies == [] or any("unrolled" in case for case in generated.cases)


def test_a_tpu_would_make_the_products_of_fp32_in_fp32(generated: Generated) -> None:
    products = [line.strip() for text in generated.asked for line in text.splitlines() if " dot(" in line]
    assert len(products) > 8 * BUCKETS * len(generated.cases)
    assert [line for line in products if "operand_precision={highest,highest}" not in line] == []
