"""What the native backend is asked for, by options and by Accelerate's configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from numina_finetune.checks import backend_faults
from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.mesh import MeshShape
from numina_finetune.torch_native.memory import explained
from numina_finetune.torch_native.mesh import native_mesh
from tests.conftest import ROOT

CONFIGS = ROOT / "configs" / "accelerate"


@pytest.mark.parametrize(
    ("text", "processes", "shape"),
    [
        (None, 4, MeshShape(data=4)),
        ("data=-1", 2, MeshShape(data=2)),
        ("fsdp=4", 4, MeshShape(fsdp=4)),
        ("data=2,fsdp=-1", 8, MeshShape(data=2, fsdp=4)),
        (None, 1, MeshShape()),
    ],
)
def test_replicas_are_the_default_and_weights_are_split_where_the_mesh_says_so(
    text: str | None, processes: int, shape: MeshShape
) -> None:
    assert native_mesh(text, processes) == shape


def test_weights_are_split_where_accelerates_configuration_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert native_mesh(None, 4) == MeshShape(fsdp=4)
    with pytest.raises(ConfigError, match=r"asks for FSDP, --mesh 'data=4' for replicas: use fsdp=4"):
        native_mesh("data=4", 4)


def test_a_mesh_for_tpus_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--mesh 'tensor=2'.*use fsdp=2 or data=2, or --backend xla"):
        native_mesh("tensor=2", 2)


@pytest.mark.parametrize(
    ("backend", "option", "value", "fault"),
    [
        ("xla", "torch_compile", True, "--torch-compile is for the native backend"),
        ("xla", "attention", "flash", "--attention flash is for the native backend"),
        ("native", "attention", "splash", "--attention splash is a kernel for TPUs"),
        ("native", "experts", "capacity", "--experts capacity is for XLA"),
    ],
)
def test_an_option_of_the_other_backend_is_refused(backend: str, option: str, value: object, fault: str) -> None:
    (found,) = backend_faults(RunConfig.from_mapping({option: value}), backend)
    assert found.startswith(fault)
    assert not backend_faults(RunConfig.from_mapping({option: value}), {"xla": "native", "native": "xla"}[backend])


def test_what_is_computed_again_cannot_be_chosen_inside_a_compiled_layer() -> None:
    (found,) = backend_faults(RunConfig(torch_compile=True, remat="dots"), "native")
    assert "use none or full" in found


def test_a_device_without_room_is_one_message_with_its_fixes() -> None:
    refusal = pytest.raises(ConfigError, match=r"memory of cuda:0 .*--per-device-train-batch-size.*--mesh fsdp=N")
    with refusal, explained(torch.device("cuda:0")):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_reads_each_configuration_and_leaves_the_precision_to_us(path: Path) -> None:
    assert load_config_from_file(str(path)).mixed_precision == "no"
