"""How this process was started, which backend it should use, and what its environment must say first.

Everything here happens before accelerate, transformers or torch_xla is imported: Accelerate picks XLA whenever
torch_xla is installed, and only ``USE_TORCH_XLA=false`` in the environment at its import keeps it native.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

from numina_finetune.config import RunConfig
from numina_finetune.process_tree import die_with_parent


def launcher() -> str | None:
    """The launcher that started this process, if one did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "accelerate launch"
    return None


def stop_with_launcher() -> None:
    """Ask the kernel for SIGTERM when the launcher dies.

    ``accelerate launch`` does not forward SIGTERM: without this, stopping it would orphan the training, which would
    go on (and write checkpoints) unseen.
    """
    if launcher() is not None:
        die_with_parent(signal.SIGTERM, os.getppid())


def choose_backend(config: RunConfig) -> tuple[str, str]:
    """``xla`` or ``native``, and why.

    ``auto`` takes XLA on a TPU (or where ``PJRT_DEVICE`` asks for a device), else the native backend.
    """
    if config.backend != "auto":
        return config.backend, "asked for by --backend"
    if device := os.environ.get("PJRT_DEVICE"):
        return "xla", f"PJRT_DEVICE={device} is set"
    if tpu_attached():
        return "xla", "a TPU is attached"
    return "native", "no TPU is attached; a GPU is used where there is one"


def tpu_attached() -> bool:
    """Whether this host has TPU chips and the library to drive them."""
    chips = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def prepare_environment(backend: str) -> None:
    """Set what the libraries read at import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
        return int(os.environ.get("CPU_NUM_DEVICES", "1"))
    return None


def faults(backend: str) -> list[str]:
    """What in the environment contradicts the backend."""
    found = []
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if backend == "xla" and processes > 1:
        found.append(
            f"WORLD_SIZE={processes} with the XLA backend, which is one process a host: start it without torchrun "
            "(num_processes: 1 in Accelerate's configuration), or use --backend native"
        )
    if backend == "xla" and importlib.util.find_spec("torch_xla") is None:
        found.append("--backend xla needs torch_xla, which is not installed: install it, or use --backend native")
    wish = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wish not in ("no", "bf16"):
        found.append(
            f"Accelerate's configuration asks for mixed_precision {wish}: set it to 'no' and use --precision bf16"
        )
    return found
