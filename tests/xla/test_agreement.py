"""However the step is built, its loss and gradients are plain transformers', packed sequences included."""

from __future__ import annotations

import importlib.util
import json

import pytest

from tests.conftest import environment
from tests.programs import run_module

LOSS = {"fp64": 1e-9, "fp32": 5e-6}
GRADIENT = {"fp64": 1e-9, "fp32": 1e-5}


def agreement(
    devices: int, dtype: str, mesh: str, attention: str, *cases: str
) -> dict[str, tuple[float, float, int, int]]:
    env = environment(devices=devices, JAX_PLATFORMS="cpu")
    result = run_module("tests.xla.agreement", dtype, mesh, attention, *cases, env=env, timeout=900)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("devices", "dtype", "mesh", "cases"),
    [
        (4, "fp64", "fsdp=2,tensor=2", ["scan,none,vocabulary", "scan,dots", "scan,full,untied"]),
        pytest.param(
            *(4, "fp32", "data=2,fsdp=2", ["scan,full,untied", "unrolled,full,vocabulary"]), marks=pytest.mark.slow
        ),
        pytest.param(*(1, "fp32", "fsdp=1", ["scan,dots,vocabulary,whole", "unrolled,none"]), marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_transformers(devices: int, dtype: str, mesh: str, cases: list[str]) -> None:
    for case, (loss, gradient, _, rounded) in agreement(devices, dtype, mesh, "torch", *cases).items():
        assert loss < LOSS[dtype], case
        assert gradient < GRADIENT[dtype], case
        assert rounded == 0, case


@pytest.mark.parametrize(
    ("devices", "mesh", "cases"),
    [
        pytest.param(*(1, "fsdp=1", ["scan,full,8 experts", "unrolled,none,8 experts,2"]), marks=pytest.mark.slow),
        (4, "fsdp=2,expert=2", ["scan,full,32 experts", "scan,dots,8 experts"]),
        pytest.param(
            *(4, "fsdp=2,tensor=2", ["scan,none,8 experts", "unrolled,full,8 experts,2"]), marks=pytest.mark.slow
        ),
    ],
)
def test_gpt_oss_has_the_loss_and_gradients_of_transformers(devices: int, mesh: str, cases: list[str]) -> None:
    for case, (loss, gradient, _, rounded) in agreement(devices, "fp32", mesh, "torch", *cases).items():
        assert loss < LOSS["fp32"], case
        assert gradient < GRADIENT["fp32"], case
        assert rounded == 0, case


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="the kernels are JAX's, which is not installed")
@pytest.mark.parametrize(
    ("mesh", "attention", "cases"),
    [
        ("fsdp=2,expert=2", "splash", ["scan,full,8 experts,2,dropless"]),
        pytest.param(
            *("expert=2,tensor=2", "torch", ["scan,dots,32 experts,dropless", "scan,full,8 experts,2,capacity"]),
            marks=pytest.mark.slow,
        ),
        pytest.param("data=2,expert=2", "torch", ["unrolled,full,8 experts,2,dropless"], marks=pytest.mark.slow),
    ],
)
def test_gpt_oss_by_kernels_has_the_same_loss_and_gradients(mesh: str, attention: str, cases: list[str]) -> None:
    for case, (loss, gradient, _, rounded) in agreement(4, "fp32", mesh, attention, *cases).items():
        assert loss < LOSS["fp32"], case
        assert gradient < GRADIENT["fp32"], case
        assert rounded == 0, case


@pytest.mark.parametrize(
    ("mesh", "cases"),
    [
        ("fsdp=2,expert=2", ["scan,full,8 experts,lora"]),
        pytest.param("fsdp=2,expert=2", ["unrolled,full,8 experts,2,lora,dropless"], marks=pytest.mark.slow),
        pytest.param(
            *("fsdp=2,tensor=2", ["scan,none,lora", "unrolled,full,8 experts,2,lora"]), marks=pytest.mark.slow
        ),
        pytest.param(
            "fsdp=2,tensor=2", ["scan,dots,untied,lora,vocabulary", "unrolled,none,lora"], marks=pytest.mark.slow
        ),
    ],
)
def test_adapters_have_the_loss_and_gradients_that_peft_gives_them(mesh: str, cases: list[str]) -> None:
    for case, (loss, gradient, _, rounded) in agreement(4, "fp32", mesh, "torch", *cases).items():
        assert loss < LOSS["fp32"], case
        assert gradient < GRADIENT["fp32"], case
        assert rounded == 0, case


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="the kernel is JAX's, which is not installed")
@pytest.mark.slow
def test_the_splash_kernel_gives_the_same_loss_and_gradients() -> None:
    for case, (loss, gradient, _, rounded) in agreement(
        4, "fp32", "fsdp=2,tensor=2", "splash", "scan,full", "scan,dots"
    ).items():
        assert loss < LOSS["fp32"], case
        assert gradient < GRADIENT["fp32"], case
        assert rounded == 0, case


def test_the_program_of_a_scanned_model_does_not_grow_with_its_layers() -> None:
    products = {case: counts[2] for case, counts in agreement(1, "fp32", "fsdp=1", "torch", *DEPTHS).items()}
    assert len(set(products.values())) == 1, products


DEPTHS = ("scan,full,4", "scan,full,8")


def test_one_over_n_is_not_rounded_to_the_compute_type() -> None:
    result = run_module("tests.xla.scaling", env=environment(devices=1))
    assert result.returncode == 0, result.stderr[-3000:]
    told = json.loads(result.stdout.splitlines()[-1])
    assert {form: by_hidden for form, (by_hidden, _) in told.items()} == {"BySequence": 0, "ByVocabulary": 0}
