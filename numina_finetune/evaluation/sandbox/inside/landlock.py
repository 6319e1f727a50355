"""Landlock: the files that a process and its children may touch, whatever their permissions say.

Source: linux/landlock.h and https://docs.kernel.org/userspace-api/landlock.html.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable

from .kernel import call

_READ_FILE, _READ_FOLDER, _WRITE, _TRUNCATE, _REFER, _DEVICE = 1 << 2, 1 << 3, 1 << 1, 1 << 14, 1 << 13, 1 << 15
_MAKE_AND_REMOVE = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12
"""Remove folders and files; make folders, files and symbolic links; not devices, sockets or pipes."""
_RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""How many file rights, lowest bits first, a version of the interface knows; later ones know those of the last."""
_SCOPES_SINCE = 6
_ASK_VERSION, _PATH_BENEATH = 1, 1


def version() -> int:
    """Of the kernel's interface, from 1.

    Raises:
        OSError: there is none, or it is switched off.
    """
    return call("landlock_create_ruleset", None, 0, _ASK_VERSION)


def restrict(*, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Refuse this process all files but those named and those in them; needs no privilege, cannot be undone.

    TCP is refused, and from version 6 on also signals and abstract sockets to processes that are not so restricted.

    Raises:
        OSError: the kernel cannot do it, or a path does not exist.
    """
    has = version()
    handled = (1 << _RIGHTS_OF_VERSION[min(has, max(_RIGHTS_OF_VERSION))]) - 1
    network, scopes = (3 if has >= 4 else 0), (3 if has >= _SCOPES_SINCE else 0)
    size = 24 if has >= _SCOPES_SINCE else 16 if has >= 4 else 8
    ruleset = call("landlock_create_ruleset", struct.pack("QQQ", handled, network, scopes)[:size], size, 0)
    read = _READ_FILE | _READ_FOLDER
    for path in readable:
        _allow(ruleset, path, read & handled)
    for path in writable:
        _allow(ruleset, path, (read | _WRITE | _TRUNCATE | _REFER | _MAKE_AND_REMOVE) & handled)
    call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(opened).st_mode):
            rights &= _READ_FILE | _WRITE | _TRUNCATE | _DEVICE
        call("landlock_add_rule", ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, opened), 0)
    finally:
        os.close(opened)
