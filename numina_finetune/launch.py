"""How this process was started, which backend it should use, and what its environment must say first.

Everything here happens before accelerate, transformers or torch_xla is imported: Accelerate picks XLA whenever
torch_xla is installed, and only ``USE_TORCH_XLA=false`` in the environment at its import keeps it native.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

from numina_finetune import accelerate_settings
from numina_finetune.config import RunConfig
from numina_finetune.launchers import launcher, set_by_user
from numina_finetune.metadata import NoAnswer, Service
from numina_finetune.process_tree import die_with_parent
from numina_finetune.tpu import pci_chips

_WORKER_NUMBER = "instance/attributes/agent-worker-number"
"""Metadata key of a TPU host's number in its slice."""
_MOST_VIRTUAL = 127
"""torch's autograd counts a process's devices in 8 bits."""


def stop_with_launcher() -> None:
    """Ask the kernel for SIGTERM when the launcher dies.

    ``accelerate launch`` does not forward SIGTERM: without this, stopping it would orphan the training, which would
    go on (and write checkpoints) unseen.
    """
    if launcher() is not None:
        die_with_parent(signal.SIGTERM, os.getppid())


def is_first_process(metadata_url: str = RunConfig.metadata_url) -> bool:
    """Whether this is the first of all processes that were started together, as told without a device library.

    A launcher numbers its processes; the hosts of a TPU slice are numbered by their environment or their machines.

    Args:
        metadata_url: of the service that is asked on a TPU host.
    """
    if rank := os.environ.get("RANK"):
        return rank == "0"
    if os.environ.get("MEGASCALE_SLICE_ID", "0") != "0":
        return False
    number = os.environ.get("CLOUD_TPU_TASK_ID") or os.environ.get("TPU_WORKER_ID")
    if number is None and tpu_attached():
        try:
            number = Service(metadata_url).get(_WORKER_NUMBER).text
        except NoAnswer:  # a host that is alone
            number = None
    return number in (None, "0")


def environment_of_command(number: int) -> dict[str, str]:
    """Variables of a command that all processes of this launch start, the ``number``-th (from 1) to meet the others.

    A launcher keeps one store for all its processes' life, at ``MASTER_PORT``, and a command would find there what an
    earlier one wrote: each gets a port, and a store on it, of its own.
    """
    variables = dict(os.environ)
    if variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        lowest, ports = 1024, (1 << 16) - 1024
        port = (int(variables["MASTER_PORT"]) - lowest + number) % ports + lowest
        variables |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
    return variables


def choose_backend(config: RunConfig) -> tuple[str, str]:
    """``xla`` or ``native``, and why.

    ``auto`` goes by what the user set (``PJRT_DEVICE`` asks for XLA, Accelerate's ``--cpu`` for the CPU), and then by
    the machine: XLA on a TPU, else the native backend. What a library set counts for nothing.
    """
    if config.backend != "auto":
        return config.backend, "asked for by --backend"
    device = os.environ.get("PJRT_DEVICE")
    if device and set_by_user("PJRT_DEVICE"):
        return "xla", f"PJRT_DEVICE={device} is set"
    if accelerate_settings.asks_for(accelerate_settings.USE_CPU):
        return "native", f"{accelerate_settings.USE_CPU}={os.environ[accelerate_settings.USE_CPU]} is set"
    if tpu_attached():
        return "xla", "a TPU is attached"
    why = "no TPU is attached; a GPU is used where there is one"
    return "native", f"{why}; PJRT_DEVICE={device} was set by torch_xla, not by you" if device else why


def tpu_attached() -> bool:
    """Whether this host has TPU chips and the library to drive them."""
    return bool(_tpu_files()) and importlib.util.find_spec("libtpu") is not None


def _tpu_files() -> list[Path]:
    return [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]


def prepare_environment(backend: str) -> None:
    """Set what the libraries read at import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # With it, transformers loads differently on all processes but one, which hands out nothing here.
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    if not set_by_user("PJRT_DEVICE"):
        os.environ.pop("PJRT_DEVICE", None)
    if backend == "native":
        os.environ["USE_TORCH_XLA"] = "false"
        return
    os.environ["USE_TORCH_XLA"] = "true"
    os.environ.setdefault("PJRT_DEVICE", "TPU" if tpu_attached() else "CPU")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def device_count(backend: str) -> int | None:
    """Devices of the run as far as the environment tells; None where only the device library knows."""
    if backend == "native":
        return int(os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("PJRT_DEVICE") == "CPU":
        virtual = os.environ.get("CPU_NUM_DEVICES", "1")
        return int(virtual) if virtual.isdecimal() else None
    return None


def faults(backend: str, options: RunConfig) -> list[str]:
    """What in the environment contradicts the backend, or asks for what the options do not."""
    found = []
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if backend == "xla" and processes > 1:
        found.append(
            f"WORLD_SIZE={processes} with the XLA backend, which is one process a host: start it without torchrun "
            "(num_processes: 1 in Accelerate's configuration), or use --backend native"
        )
    if backend == "xla" and importlib.util.find_spec("torch_xla") is None:
        found.append("--backend xla needs torch_xla, which is not installed: install it, or use --backend native")
    if backend == "xla" and os.environ.get("PJRT_DEVICE") == "TPU" and not (_tpu_files() or pci_chips()):
        found.append(
            "PJRT_DEVICE=TPU (which `accelerate launch --tpu` means too), and no TPU is attached: leave it out, or set "
            "PJRT_DEVICE=CPU for XLA on the CPU"
        )
    if backend == "xla" and os.environ.get("PJRT_DEVICE") == "CPU":
        virtual = os.environ.get("CPU_NUM_DEVICES", "1")
        if not virtual.isdecimal() or not 1 <= int(virtual) <= _MOST_VIRTUAL:
            found.append(f"CPU_NUM_DEVICES={virtual} is no number of virtual devices: use 1 to {_MOST_VIRTUAL}")
    return found + accelerate_settings.faults(options, backend)
