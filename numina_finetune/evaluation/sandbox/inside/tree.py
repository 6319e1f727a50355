"""The file tree that sandboxed code sees: libraries, three devices, and one folder of its own."""

from __future__ import annotations

import os
import site
import stat
import sysconfig
from pathlib import Path

from . import kernel

HOME = "/sandbox"
"""The private folder: the only place that can be written, empty at first."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_SCAFFOLD = "/tmp"
"""A mount point of this mount namespace, in which the new root is put together."""


def libraries() -> list[str]:
    """Where this Python, its packages and the system's libraries lie; no path is inside another one."""
    paths = sysconfig.get_paths()
    wanted = [*_SYSTEM, *(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))]
    # compiled modules of a Python with a shared library of its own link to it
    wanted += [*site.getsitepackages(), sysconfig.get_config_var("LIBDIR") or ""]
    existing = sorted({path for path in wanted if path and Path(path).exists()})
    return [path for path in existing if not any(path.startswith(f"{other}/") for other in existing)]


def build() -> None:
    """Make a tree of the libraries (read-only) and devices this mount namespace's root; nothing else stays in reach.

    Raises:
        OSError: the kernel refuses a mount.
    """
    kernel.make_mounts_private()
    links = {path: Path(path).readlink() for path in libraries() if Path(path).is_symlink()}
    sources = {path: os.open(path, os.O_PATH) for path in [*libraries(), *DEVICES] if path not in links}
    kernel.mount_tmpfs(_SCAFFOLD, "mode=0755,size=64k")
    Path(_SCAFFOLD + HOME).mkdir()
    for path, target in links.items():
        link = Path(_SCAFFOLD + path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    for path, source in sources.items():
        _show(source, path)
        os.close(source)
    kernel.change_root(_SCAFFOLD)
    kernel.restrict_mount("/", kernel.READ_ONLY, recursive=False)


def add_home(size: int, files: int) -> None:
    """Mount the private folder, and be in it.

    Args:
        size: bytes it may hold.
        files: files and folders it may hold.
    """
    kernel.mount_tmpfs(HOME, f"mode=0700,size={size},nr_inodes={files}")
    os.chdir(HOME)


def _show(source: int, path: str) -> None:
    """Bind what is open as ``source`` at its path in the new tree, read-only."""
    target = Path(_SCAFFOLD + path)
    if stat.S_ISDIR(os.fstat(source).st_mode):
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    kernel.bind(f"/proc/self/fd/{source}", str(target))
    attributes = kernel.READ_ONLY | kernel.NO_SUID | (0 if path in DEVICES else kernel.NO_DEVICES)
    kernel.restrict_mount(str(target), attributes, recursive=True)
