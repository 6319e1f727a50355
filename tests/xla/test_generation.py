"""On the mesh, greedy tokens are transformers' own, drawn ones those of a plain decoder, and two programs make them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment
from tests.decoding import TIE

BUCKETS = 2
"""Padded widths that the prompts come to, in batches of four: 128 and 256."""
needs_jax = pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="the kernels are JAX's")


@pytest.mark.parametrize(
    ("devices", "mesh", "cases"),
    [
        (4, "fsdp=2,tensor=2", ["qwen3-windows,scan,sampled"]),
        pytest.param(4, "fsdp=2,expert=2", ["gpt-oss,scan,dropless"], marks=needs_jax),
        pytest.param(4, "fsdp=4", ["qwen3,scan", "gpt-oss,unrolled,lora"], marks=pytest.mark.slow),
        pytest.param(1, "fsdp=1", ["qwen3,scan", "gpt-oss,scan,sampled"], marks=pytest.mark.slow),
        pytest.param(
            *(4, "fsdp=2,tensor=2", ["gpt-oss,scan,lora", "qwen3-windows,unrolled,sampled"]), marks=pytest.mark.slow
        ),
        pytest.param(
            *(4, "data=2,expert=2", ["gpt-oss,scan,capacity", "gpt-oss,scan,splash,sampled"]),
            marks=[pytest.mark.slow, needs_jax],
        ),
    ],
)
def test_tokens_are_those_of_transformers_from_two_programs_for_each_width(
    devices: int, mesh: str, cases: list[str]
) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.xla.generation", mesh, *cases],
        env=environment(devices=devices, JAX_PLATFORMS="cpu"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for case, found in json.loads(result.stdout.splitlines()[-1]).items():
        assert all(gap < TIE for gap in found["gaps"]), (case, found)
        assert len(found["gaps"]) <= 1, (case, found)
        assert found["compilations"] == 2 * BUCKETS, case
        assert found["changed"] == ("sampled" in case), "another seed draws other tokens, with the same programs"
