"""Programs that an earlier attempt compiled are read back instead of compiled again.

Below torch_xla, in the device library (`numina_finetune.xla.plugin`): whatever asks for a program to be compiled gets
the one that is kept under the hash of the program, the compiler's options, the library and the devices. Nothing is
taken on trust: before anything is kept, one small program is compiled, written out, read back and run.
"""

from __future__ import annotations

import _thread
import hashlib
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch_xla
import torch_xla.runtime as xr

from numina_finetune.processes import ProcessGroup
from numina_finetune.xla.plugin import Compilation, Plugin, PluginError
from numina_finetune.xla.program_files import ProgramFiles, open_files
from numina_finetune.xla.program_text import canonical

logger = logging.getLogger(__name__)

MIN_SECONDS = 1.0
"""Programs that compile faster are not kept: reading them back would save nothing."""
_LIBRARIES = {"TPU": ("TPU_LIBRARY_PATH", "PTXLA_TPU_LIBRARY_PATH"), "LIBRARY": ("PJRT_LIBRARY_PATH",)}
"""Where torch_xla takes the device library from, by device type. Its own CPU devices are in no library."""
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_SOON = 0.2
"""Seconds, after which the compiler's caller has ended or is waiting for the devices."""


@dataclass
class _Made:
    """What became of one call of the compiler."""

    ready: bool = False
    error: int | None = None
    """The library's, for the caller."""


class Programs:
    """The compiled programs of this process, and what was kept of them."""

    def __init__(self, plugin: Plugin, files: ProgramFiles) -> None:
        self._plugin, self._files = plugin, files
        self._surroundings: bytes | None = None
        self._proving, self._works = False, False
        self.read_back = 0
        """Programs that were not compiled here."""
        plugin.replace_compile(self._made)

    def prove(self, processes: ProcessGroup) -> bool:
        """Whether the library reads back what it writes, on all hosts; if not, everything is compiled, as ever."""
        with self._files.trying(f"proof-{self._plugin.size}") as first:
            why = "" if first else "an earlier attempt ended while trying it"
            if not processes.any(bool(why)):  # the hosts run the small program together, or none does
                why = self._fault()
        self._works = not processes.any(bool(why))
        if why:
            logger.warning("every attempt compiles anew, as compiled programs cannot be read back here: %s", why)
        return self._works

    def settle(self, seconds: float) -> None:
        """Wait for what is being stored, at most so long."""
        self._files.settle(seconds)

    def _fault(self) -> str:
        """What is wrong with a small program that went through the library's bytes; empty if nothing is."""
        self._proving, before = True, self.read_back
        try:
            values = torch.arange(8, dtype=torch.float32).to(torch_xla.device())
            found = (values * 3 + 1).cpu().tolist()
            if found != [3.0 * number + 1 for number in range(8)]:
                return f"a small program computed {found} afterwards"
            return "" if self.read_back > before else "its compiler is not called through its table"
        except (PluginError, RuntimeError, ValueError) as error:
            return str(error).partition("\n")[0]
        finally:
            self._proving, self.read_back = False, before

    def _made(self, call: Compilation) -> int | None:
        """In place of the library's compiler: no exception may leave it, as the caller is no Python."""
        made = _Made()
        try:
            self._make(call, made)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):  # raised again once the caller is back in Python
                threading.Timer(_SOON, _thread.interrupt_main).start()
            else:
                logger.warning("a compiled program could not be kept or read back: %s", error)
            if not made.ready:
                made.error = self._plugin.compile(call)
        return made.error

    def _make(self, call: Compilation, made: _Made) -> None:
        name = self._name(call) if self._works else ""
        if name and self._load(name, call):
            made.ready = True
            return
        began = time.monotonic()
        made.error = self._plugin.compile(call)
        made.ready = True
        if made.error:
            return
        if self._proving:
            self._exchange(call)
        elif name and time.monotonic() - began >= MIN_SECONDS:
            self._files.keep(name, self._plugin.serialized(call.executable))

    def _load(self, name: str, call: Compilation) -> bool:
        """Give what is kept under the name to the caller; False where nothing is, or nothing good."""
        data = self._files.find(name)
        if data is None:
            return False
        with self._files.trying(name) as first:
            try:
                if not first:
                    raise PluginError("an earlier attempt ended while reading it")
                call.executable = self._plugin.loaded(call.client, data)
            except PluginError as error:
                logger.warning("a kept program is deleted, and compiled anew: %s", error)
                self._files.forget(name)
                return False
        self.read_back += 1
        return True

    def _exchange(self, call: Compilation) -> None:
        """Put what was written out and read back in the place of what was compiled."""
        compiled = call.executable
        call.executable = self._plugin.loaded(call.client, self._plugin.serialized(compiled))
        self._plugin.unload(compiled)
        self.read_back += 1

    def _name(self, call: Compilation) -> str:
        if self._surroundings is None:
            told = self._plugin.description(call.client)
            told += [f"{name}={os.environ.get(name, '')}" for name in _ENVIRONMENT]
            self._surroundings = "\n".join(told).encode()
        digest = hashlib.sha256()
        code, form, options = call.parts
        for part in (self._surroundings, canonical(code), form, options):
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def open_programs(run_url: str | None, processes: ProcessGroup) -> Programs | None:
    """Keep this process's compiled programs, and read back those of earlier attempts; None where that cannot be.

    Every process of a run calls it, after SPMD mode has begun and before anything is compiled.

    Args:
        run_url: the run's place, None where there is no run.
    """
    variables = _LIBRARIES.get(xr.device_type() or "", ())
    library = next((os.environ[name] for name in variables if os.environ.get(name)), None)
    if library is None:
        logger.warning("every attempt compiles anew: torch_xla's own %s devices keep no programs", xr.device_type())
        return None
    plugin = None
    try:
        plugin = Plugin(Path(library))
    except PluginError as error:
        logger.warning("every attempt compiles anew: %s", error)
    if processes.any(plugin is None) or plugin is None:
        return None
    programs = Programs(plugin, open_files(run_url, processes.index))
    return programs if programs.prove(processes) else None
