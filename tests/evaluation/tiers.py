"""The kinds of protection that sandboxes are tested with, where the machine has them."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from numina_finetune.errors import ConfigError
from numina_finetune.evaluation.sandbox import Minimum, protections
from numina_finetune.evaluation.sandbox.sandbox import LAYERS

TIERS = {
    Minimum.ISOLATED: LAYERS,
    Minimum.FILTERED: frozenset({"seccomp", "landlock"}),
    Minimum.NONE: frozenset[str](),
}


@cache
def missing(tier: Minimum) -> str:
    """What this machine lacks of a tier's layers; empty if nothing."""
    try:
        found = protections(TIERS[tier])
    except ConfigError as error:
        if "cannot be read by user" not in str(error):  # a fault of the sandbox, not of the machine
            raise
        return str(error)
    return ", ".join(f"{name}: {found[name]}" for name in TIERS[tier] if found[name])


def usable(tier: Minimum) -> frozenset[str]:
    """The layers of a tier; skips the test where this machine does not have them."""
    if lacks := missing(tier):
        pytest.skip(f"this machine does not protect so: {lacks}")
    return TIERS[tier]


def ordinary_user(command: Sequence[str]) -> list[str]:
    """The command as one that root runs as another user; skips the test where that cannot be done.

    A Python under /root is shown to that user by mounts of the command's own.
    """
    if not shutil.which("unshare") or not shutil.which("setpriv"):
        pytest.skip("there is no unshare or setpriv to become another user with")
    prefix = Path(sys.base_prefix)
    opened = f"""
        mount -t tmpfs none /mnt && mkdir /mnt/python && mount --bind {shlex.quote(str(prefix))} /mnt/python
        mount -t tmpfs -o mode=755 none /root && mkdir -p {shlex.quote(str(prefix))}
        mount --bind /mnt/python {shlex.quote(str(prefix))}
    """
    script = opened if prefix.is_relative_to("/root") else ""
    become = 'exec setpriv --reuid 65533 --regid 65533 --clear-groups "$@"'
    return ["unshare", "--mount", "sh", "-c", f"{script}\n{become}", "sh", *command]
