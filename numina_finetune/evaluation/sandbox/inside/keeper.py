"""The process that sandboxes are forked from: packages imported once, nothing secret in its memory, no code ever run.

It is started with an empty environment, and ends with the host.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from . import confinement, tree, warden, wire

PACKAGES = (
    *("sympy", "numpy", "numpy.linalg", "numpy.random", "mpmath", "math", "cmath", "fractions", "decimal", "json"),
    *("itertools", "collections", "functools", "random", "re", "datetime", "string", "operator", "typing", "heapq"),
    *("bisect", "statistics", "ctypes", "dataclasses", "inspect", "textwrap", "calendar", "threading", "tempfile"),
)
"""Imported before any sandbox is made, where installed."""


def main(control: int, host: int, layers: list[str]) -> None:
    """Fork a sandbox for every request, until the host ends or closes its side.

    Args:
        control: descriptor of the socket to the host; each packet is a request: limits as JSON, and the sandbox's
            own socket.
        host: the host's process id.
        layers: what to confine with, where the machine has it.
    """
    connection = socket.socket(fileno=control)
    alive = os.pidfd_open(host)
    found = confinement.probe(frozenset(layers))
    usable = frozenset(name for name, fault in found.items() if fault is None)
    namespaces = confinement.NAMESPACES in usable
    sys.path[:] = [path for path in sys.path if _is_library(path)]
    _import_packages()
    mapped = confinement.address_space()
    confinement.confine_keeper(namespaces=namespaces)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps wardens
    gc.freeze()  # collections in sandboxes leave shared pages alone
    connection.send(json.dumps(found).encode())
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(alive, select.POLLIN)
    while alive not in dict(poll.poll()):
        request, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 1)
        if not request:
            return
        with socket.socket(fileno=descriptors[0]) as sandbox:
            _fork(sandbox, [control, alive], json.loads(request) | {"mapped": mapped}, usable)


def _fork(sandbox: socket.socket, outer: list[int], limits: dict[str, Any], layers: frozenset[str]) -> None:
    """Fork the warden of one sandbox.

    Args:
        sandbox: its connection to the host.
        outer: the keeper's own descriptors, which are none of its business.
    """
    keeper = os.getpid()
    try:
        if os.fork():
            return
    except OSError as error:
        _tell(sandbox, f"no sandbox could be made: {error}")
        return
    try:
        for descriptor in outer:
            os.close(descriptor)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        warden.serve(sandbox, limits, layers, keeper)
    except (OSError, wire.WireError) as error:
        _tell(sandbox, f"the sandbox failed: {error}")
    finally:
        os._exit(0)


def _tell(sandbox: socket.socket, fault: str) -> None:
    with suppress(OSError):  # the host may have gone
        wire.send(sandbox, {"outcome": "killed", "lost": fault, "output": ""})


def _import_packages() -> None:
    for name in PACKAGES:
        with suppress(ImportError):
            importlib.import_module(name)
    if numpy := sys.modules.get("numpy"):
        numpy.set_printoptions(legacy="1.25")


def _is_library(path: str) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in tree.libraries())
