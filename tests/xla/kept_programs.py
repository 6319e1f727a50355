"""``python -m tests.xla.kept_programs FOLDER [broken]``: programs on a real device library, kept and read back.

The library is XLA's own for CPUs, behind the same interface as libtpu; torch_xla drives both by the same code.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
from pathlib import Path

import xla_plugins.xla_cpu_pjrt as package

LIBRARY = next(Path(next(iter(package.__path__))).glob("*.so"))
EXECUTE, LOAD = 55, 56
HEAD = 40
_kept: list[object] = []
Function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


def _words(address: int, count: int) -> ctypes.Array[ctypes.c_size_t]:
    return (ctypes.c_size_t * count).from_address(address)


def _slot(place: int) -> ctypes.c_void_p:
    library = ctypes.CDLL(str(LIBRARY))
    library.GetPjrtApi.restype = ctypes.c_void_p
    return ctypes.c_void_p.from_address(library.GetPjrtApi() + HEAD + 8 * place)


def _replace(place: int, function: object) -> None:
    _kept.append(function)
    _slot(place).value = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]


def let_an_older_caller_execute() -> None:
    """The library is younger than torch_xla, and wants options that torch_xla does not know: they are 0."""
    execute = Function(_slot(EXECUTE).value)  # type: ignore[arg-type]

    def padded(arguments: int) -> int | None:
        given = _words(arguments, 4)[3]
        options = (ctypes.c_char * 256)()
        ctypes.memmove(options, given, _words(given, 1)[0])
        _words(ctypes.addressof(options), 1)[0] = 256
        _words(arguments, 4)[3] = ctypes.addressof(options)
        error: int | None = execute(arguments)
        _words(arguments, 4)[3] = given
        return error

    _replace(EXECUTE, Function(padded))


def let_nothing_be_read_back() -> None:
    """As a library that cannot: whatever it is given is refused, by the library itself."""
    load = Function(_slot(LOAD).value)  # type: ignore[arg-type]

    def cut_off(arguments: int) -> int | None:
        _words(arguments, 5)[4] //= 2
        error: int | None = load(arguments)
        return error

    _replace(LOAD, Function(cut_off))


def main(folder: Path, *how: str) -> None:
    os.environ |= {"PJRT_DEVICE": "LIBRARY", "PJRT_DYNAMIC_PLUGINS": "1", "PJRT_LIBRARY_PATH": str(LIBRARY)}
    os.environ |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "XDG_CACHE_HOME": str(folder / "machine")}
    let_an_older_caller_execute()
    if "broken" in how:
        let_nothing_be_read_back()
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("numina_finetune").addHandler(handler)

    import numpy as np
    import torch
    import torch_xla
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    from numina_finetune.processes import ProcessGroup
    from numina_finetune.xla import programs
    from numina_finetune.xla.runtime import compile_seconds

    programs.MIN_SECONDS = 0.0
    xr.use_spmd()
    opened = programs.open_programs(str(folder / "run"), ProcessGroup())
    mesh = xs.Mesh(np.arange(4), (4,), ("data",))
    weight = torch.eye(8).to(torch_xla.device()) * 2
    rows = torch.arange(64.0).reshape(8, 8).to(torch_xla.device())
    xs.mark_sharding(rows, mesh, ("data", None))
    for _ in range(2):
        rows = (rows @ weight).relu() + rows.mean()
        torch_xla.sync()
    total = float(rows.sum())
    found = {
        "on": opened is not None,
        "read_back": opened.read_back if opened else 0,
        "sum": total,
        "seconds": compile_seconds(),
        "told": told,
    }
    if opened:
        opened.settle(30)
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
