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

from . import confinement, tree, warden, wire

PACKAGES = (
    *(
        "sympy",
        "numpy",
        "numpy.linalg",
        "numpy.random",
        "mpmath",
        "math",
        "cmath",
        "fractions",
        "decimal",
        "statistics",
    ),
    *("itertools", "collections", "functools", "random", "re", "datetime", "string", "operator", "typing", "heapq"),
    *("bisect", "json", "ctypes", "dataclasses", "inspect", "textwrap", "calendar", "threading", "tempfile", "enum"),
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
        _fork(connection, alive, descriptors[0], request, usable, mapped)


def _fork(
    connection: socket.socket, alive: int, descriptor: int, request: bytes, layers: frozenset[str], mapped: int
) -> None:
    keeper = os.getpid()
    sandbox = socket.socket(fileno=descriptor)
    try:
        if os.fork() == 0:
            _warden(connection, alive, sandbox, request, layers, mapped, keeper)
    except OSError as error:
        with suppress(OSError):
            wire.send(sandbox, {"outcome": "killed", "lost": f"no sandbox could be made: {error}", "output": ""})
    sandbox.close()


def _warden(
    connection: socket.socket,
    alive: int,
    sandbox: socket.socket,
    request: bytes,
    layers: frozenset[str],
    mapped: int,
    keeper: int,
) -> None:
    try:
        connection.close()
        os.close(alive)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        warden.serve(sandbox, json.loads(request) | {"mapped": mapped}, layers, keeper)
    except (OSError, wire.WireError) as error:
        with suppress(OSError):
            wire.send(sandbox, {"outcome": "killed", "lost": f"the sandbox failed: {error}", "output": ""})
    finally:
        os._exit(0)


def _import_packages() -> None:
    for name in PACKAGES:
        with suppress(ImportError):
            importlib.import_module(name)
    if numpy := sys.modules.get("numpy"):
        numpy.set_printoptions(legacy="1.25")


def _is_library(path: str) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in tree.libraries())
