"""What ``accelerate launch`` can be asked for is done as asked, or refused by name; its own functions are asked."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import launch as accelerate_launch

from numina_finetune.accelerate_settings import SETTINGS, faults, hidden, setting_of
from numina_finetune.config import RunConfig
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
FSDP = ("--use_fsdp", "--num_processes", "2", "--fsdp_version", "2")
PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")

CHANGES_NOTHING = {
    *("--debug", "--enable_cpu_affinity"),
    # Read by FSDP1, by a wrapping or a loading of weights that is not used, or always so.
    *("--fsdp_min_num_params", "--fsdp_transformer_layer_cls_to_wrap", "--fsdp_backward_prefetch"),
    *("--fsdp_use_orig_params", "--fsdp_cpu_ram_efficient_loading", "--fsdp_sync_module_states"),
}
HONOURED = {*("--cpu", "--multi_gpu", "--use_fsdp", "--mixed_precision bf16", "--fsdp_activation_checkpointing true")}
"""Natively, under the options' defaults: --precision bf16, --remat full."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a configuration of the user's own, and as if FP8 could be had here."""
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr(accelerate_launch, "is_fp8_available", lambda: True)
    monkeypatch.setattr(logging.getLogger("accelerate.commands.launch"), "disabled", True)


def environment_of(*words: str) -> dict[str, str]:
    """The variables of ours to judge that ``accelerate launch`` would hand to the training."""
    arguments = launch_command_parser().parse_args([*words, "-m", "numina_finetune"])
    arguments, *_ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = "zero_stage"
        _, told = accelerate_launch.prepare_deepspeed_cmd_env(arguments)
    elif arguments.use_fsdp or arguments.use_megatron_lm or arguments.multi_gpu:
        told = accelerate_launch.prepare_multi_gpu_env(arguments)
    else:
        _, told = accelerate_launch.prepare_simple_launcher_cmd_env(arguments)
    return {name: value for name, value in told.items() if name.startswith(PREFIXES)}


def flags() -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """Each flag of the launcher: its name, the flags that it needs beside it, and itself with another value."""
    beside = {
        "--fsdp_": FSDP,
        "--use_fsdp": FSDP[1:],
        "--megatron_lm_": ("--use_megatron_lm", "--num_processes", "2"),
        "--dynamo_backend": (),
        "--dynamo_": ("--dynamo_backend", "inductor"),
        "--fp8_": ("--mixed_precision", "fp8"),
        "--parallelism_config_": (*FSDP, "--use_parallelism_config"),
        "--use_parallelism_config": FSDP,
        "--zero": ("--use_deepspeed", "--num_processes", "2"),
        "--offload_": ("--use_deepspeed", "--num_processes", "2"),
        "--gradient_": ("--use_deepspeed", "--num_processes", "2"),
        "--deepspeed_": ("--use_deepspeed", "--num_processes", "2"),
        "--num_machines": ("--main_process_ip", "127.0.0.1", "--main_process_port", "29511"),
    }
    for action in launch_command_parser()._actions:
        name = next((name for name in action.option_strings if re.fullmatch(r"--\w+", name)), "")
        if not name or name in ("--help", "--config_file", "--module", "--no_python", "--mpirun_hostfile"):
            continue
        needed = next((words for prefix, words in beside.items() if name.startswith(prefix)), ())
        for value in _others(action):
            yield name, needed, (name, *value)


def _others(action: argparse.Action) -> list[tuple[str, ...]]:
    """Values that are not the flag's default."""
    if action.nargs == 0:
        return [()]
    if action.choices:
        return [(str(choice),) for choice in action.choices if str(choice) != str(action.default)]
    if action.default == "true" or action.default is True:
        return [("false",)]
    if action.default == "false":
        return [("true",)]
    if action.type in (int, float):
        return [("4",)]
    return [("true,false,true",)] if isinstance(action.default, tuple) else [("SHARD_GRAD_OP",)]


def test_every_flag_of_the_launcher_is_done_as_asked_or_refused_by_name() -> None:
    silent: dict[str, Any] = {}
    accepted: set[str] = set()
    for name, needed, words in flags():
        try:
            plain, asked = environment_of(*needed), environment_of(*needed, *words)
        except ValueError:  # Accelerate refuses it itself: one of its own choices is spelled wrong
            assert words == ("--dynamo_backend", "torhchxla_trace_once")
            continue
        if plain == asked:
            continue
        assert all(setting_of(variable) is not None for variable in asked), f"{name} sets what is not in the table"
        found = faults(RunConfig(), "native", asked)
        assert all("\n" not in fault and re.search(r"^[A-Z_0-9]+=", fault) for fault in found)
        if not found:
            accepted.add(name if name in CHANGES_NOTHING else " ".join(words))
            silent[" ".join(words)] = {variable: asked[variable] for variable in asked.keys() - plain.keys()}
    assert accepted == CHANGES_NOTHING | HONOURED, silent


def test_every_variable_that_accelerate_reads_is_in_the_table() -> None:
    named: set[str] = set()
    for path in Path(accelerate.__file__).parent.rglob("*.py"):
        if "test_utils" not in path.parts:
            text = path.read_text(encoding="utf-8")
            named |= set(
                re.findall(r"[\"']((?:ACCELERATE|FSDP|MEGATRON_LM|PARALLELISM_CONFIG)_[A-Z0-9_]*[A-Z0-9])[\"']", text)
            )
    named -= {"FSDP_PYTORCH_VERSION"}
    assert len(named) > 60
    assert {name for name in named if setting_of(name) is None} == set()


@pytest.mark.parametrize(
    ("words", "names", "option"),
    [
        (("--mixed_precision", "fp16"), "ACCELERATE_MIXED_PRECISION=fp16", "--precision"),
        (("--mixed_precision", "fp8"), "ACCELERATE_MIXED_PRECISION=fp8", "--precision"),
        (("--dynamo_backend", "inductor"), "ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "--torch-compile"),
        ((*FSDP[:-1], "1"), "FSDP_VERSION=1", "fsdp_version to 2"),
        ((*FSDP, "--fsdp_offload_params", "true"), "FSDP_OFFLOAD_PARAMS=true", "--mesh fsdp=N"),
        ((*FSDP, "--use_parallelism_config"), "ACCELERATE_USE_PARALLELISM_CONFIG=true", "--mesh"),
        (("--use_megatron_lm", "--num_processes", "2"), "ACCELERATE_USE_MEGATRON_LM=true", "--mesh"),
        (("--use_deepspeed", "--num_processes", "2"), "ACCELERATE_USE_DEEPSPEED=true", "--mesh fsdp=N"),
    ],
)
def test_a_refusal_names_the_variable_its_value_and_our_option(words: tuple[str, ...], names: str, option: str) -> None:
    (fault,) = faults(RunConfig(), "native", environment_of(*words))
    assert names in fault and option in fault


def test_what_the_runs_own_options_say_too_is_honoured() -> None:
    deepspeed = environment_of("--use_deepspeed", "--num_processes", "2", "--gradient_accumulation_steps", "4")
    asked = {name: text for name, text in deepspeed.items() if name == "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"}
    assert asked
    assert faults(RunConfig(gradient_accumulation_steps=4), "native", asked) == []
    (fault,) = faults(RunConfig(), "native", asked)
    assert "--gradient-accumulation-steps 4" in fault
    bf16 = environment_of("--mixed_precision", "bf16")
    assert faults(RunConfig(precision="bf16"), "native", bf16) == []
    assert len(faults(RunConfig(precision="fp32"), "native", bf16)) == 1
    compiled = environment_of("--dynamo_backend", "inductor")
    assert faults(RunConfig(torch_compile=True), "native", compiled) == []
    assert len(faults(RunConfig(), "xla", compiled)) == 1
    recomputed = environment_of(*FSDP, "--fsdp_activation_checkpointing", "true")
    assert faults(RunConfig(remat="full"), "native", recomputed) == []
    assert len(faults(RunConfig(remat="none"), "native", recomputed)) == 1


def test_fsdp_and_the_cpu_are_refused_where_xla_would_do_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    (fault,) = faults(RunConfig(), "xla", environment_of(*FSDP))
    assert "--mesh fsdp=N" in fault
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert faults(RunConfig(), "xla", environment_of("--cpu")) == []
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    (fault,) = faults(RunConfig(), "xla", environment_of("--cpu"))
    assert "ACCELERATE_USE_CPU=True" in fault


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_own_configurations_are_honoured(path: Path) -> None:
    where = ("--main_process_ip", "127.0.0.1", "--main_process_port", "0", "--machine_rank", "1")
    words = ("--config_file", str(path), *(where if path.stem == "multi_node_gpu" else ()))
    backend = "xla" if "spmd" in path.stem else "native"
    assert faults(RunConfig(), backend, environment_of(*words)) == []


def test_without_a_configuration_nothing_is_refused() -> None:
    for backend in ("native", "xla"):
        assert faults(RunConfig(), backend, environment_of()) == []


def test_hidden_settings_are_there_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = dict(os.environ)
    with hidden():
        assert [name for name in os.environ if name.startswith(PREFIXES)] == ["ACCELERATE_USE_CPU"]
    assert dict(os.environ) == before


def test_each_entry_says_what_to_do_where_it_can_be_refused() -> None:
    for name, setting in SETTINGS.items():
        assert setting.understood == ("*",) or setting.instead, name
