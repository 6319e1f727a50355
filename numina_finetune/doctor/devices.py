"""What this machine computes on, and who holds it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from numina_finetune import launch
from numina_finetune.config import RunConfig
from numina_finetune.doctor.findings import Finding, fault, note, ok

GB = 1e9
_LOCK = Path("/tmp/libtpu_lockfile")
"""libtpu's own: one process at a time may load it where a TPU is."""
_TPU_DEVICES = ("accel*", "vfio/[0-9]*")


@dataclass(frozen=True)
class Machine:
    """Where the checks look; another one's in tests."""

    dev: Path = Path("/dev")
    proc: Path = Path("/proc")
    lock: Path = _LOCK


def check_devices(config: RunConfig, machine: Machine = Machine()) -> Iterator[Finding]:
    """The devices that a run with these options would take, and what stands in its way to them."""
    backend, reason = launch.choose_backend(config)
    yield ok("backend", f"{backend} ({reason})")
    for problem in launch.faults(backend, config):
        what, _, remedy = problem.partition(": ")
        yield fault("environment", what, remedy)
    yield from _tpu(machine)
    yield from _gpus(machine)
    cores = len(os.sched_getaffinity(0))
    yield ok(
        "processor", f"{cores} cores, {memory() / GB:.1f} GB of memory, {available_memory() / GB:.1f} GB of it free"
    )


def tpu_chips(machine: Machine) -> list[Path]:
    """Device files of TPU chips."""
    return sorted(path for pattern in _TPU_DEVICES for path in machine.dev.glob(pattern))


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def _tpu(machine: Machine) -> Iterator[Finding]:
    chips = tpu_chips(machine)
    if not chips:
        yield ok("TPU", "none is attached")
        return
    if importlib.util.find_spec("libtpu") is None:
        yield fault(
            "TPU", f"{len(chips)} chips are attached, and libtpu is not installed", "pip install 'numina_finetune[tpu]'"
        )
    holders = _holders([*chips, machine.lock], machine)
    for number, command in holders.items():
        yield fault("TPU", f"process {number} ({command}) holds it", f"wait until it ends, or end it: kill {number}")
    if not holders and machine.lock.exists() and not os.access(machine.lock, os.W_OK):
        yield fault("TPU", f"{machine.lock} was left behind by another user", f"sudo rm {machine.lock}")
    elif not holders:
        yield ok("TPU", f"{len(chips)} chips, held by nobody")


def _holders(files: list[Path], machine: Machine) -> dict[int, str]:
    """Processes that have one of the files open, and their command lines; root sees those of all users."""
    wanted, found = {str(path) for path in files}, {}
    for process in machine.proc.glob("[0-9]*"):
        try:
            opened = {str(link.readlink()) for link in (process / "fd").iterdir()}
            if opened & wanted and int(process.name) != os.getpid():
                words = (process / "cmdline").read_bytes().split(b"\0")
                found[int(process.name)] = b" ".join(words).decode(errors="replace").strip()
        except OSError:  # another user's, or ended in the meantime
            continue
    return found


def _gpus(machine: Machine) -> Iterator[Finding]:
    present = sorted(machine.dev.glob("nvidia[0-9]*"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present and not count:
        yield fault(
            "GPU",
            f"{len(present)} are attached, and torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use them",
            "see nvidia-smi: the driver must be as new as that CUDA version needs",
        )
    elif not count:
        yield ok("GPU", "none is attached")
    for number in range(count):
        free, total = torch.cuda.mem_get_info(number)
        told = f"{torch.cuda.get_device_name(number)}, {free / GB:.1f} GB of {total / GB:.1f} GB free"
        used = total - free > total / 10
        yield note("GPU", told, "another process uses it: see nvidia-smi") if used else ok("GPU", told)
