"""The launcher that started this process, and whose the environment is that it handed on.

torch_xla sets ``PJRT_DEVICE`` wherever it is imported, to ``CPU`` where no TPU is; ``accelerate launch`` imports it
where it is installed, and hands the variable on to what it starts. Only what was there before is the user's.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_SCRIPTS = ("accelerate", "accelerate-launch")
_MODULES = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli")


def launcher() -> str | None:
    """The launcher that started this process, if one did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "accelerate launch" if any(_is_accelerate(pid) for pid in _ancestors()) else None


def set_by_user(name: str) -> bool:
    """Whether the user, or a script of theirs, set an environment variable, and not a library."""
    value = os.environ.get(name)
    if value is None:
        return False
    began = _first_environment(os.getpid())
    if "torch_xla" in sys.modules and began is not None and began.get(name) != value:
        return False
    below = os.getpid()
    for pid in _ancestors():
        if _is_accelerate(pid):
            before, after = _first_environment(pid), _first_environment(below)
            handed_on = after is not None and after.get(name) == value
            return before is None or before.get(name) == value or not handed_on
        below = pid
    return True


def handed_over(words: Sequence[str]) -> dict[str, str]:
    """The environment of the one training that takes the place of ``accelerate launch --tpu``.

    Accelerate hands what it was told to its other launchers' processes, but not to those for TPUs.

    Args:
        words: of Accelerate's command line, the script's name and arguments included.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    given = list(words[1:] if words[:1] == ["launch"] else words)
    arguments = launch_command_parser().parse_args(given)
    logging.disable(logging.WARNING)  # Accelerate has said it already
    try:
        arguments, *_ = _validate_launch_command(arguments)
    finally:
        logging.disable(logging.NOTSET)
    _, told = prepare_simple_launcher_cmd_env(arguments)
    environment = dict(os.environ) | {name: text for name, text in told.items() if name.startswith("ACCELERATE_")}
    if arguments.downcast_bf16:
        environment["ACCELERATE_DOWNCAST_BF16"] = "true"
    if not set_by_user("PJRT_DEVICE"):
        environment["PJRT_DEVICE"] = "TPU"
    return environment


def _ancestors() -> Iterator[int]:
    """Process ids of the parent, its parent and so on, as far as they can be seen."""
    pid = os.getppid()
    while pid > 0:  # 1 may well be a launcher, in a container
        yield pid
        try:
            # The name of the program, in parentheses, may hold anything.
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return


def _is_accelerate(pid: int) -> bool:
    """Whether a process is ``accelerate launch``: Python with its script or module."""
    words = [word.decode(errors="replace") for word in _read(pid, "cmdline").split(b"\0")]
    if not Path(words[0]).name.startswith("python"):
        return False
    return any(Path(word).name in _SCRIPTS or word in _MODULES for word in words[1:4])


def _first_environment(pid: int) -> dict[str, str] | None:
    """The environment that a process began with, whatever it changed since; None where it cannot be seen."""
    text = _read(pid, "environ").decode(errors="replace")
    pairs = (entry.partition("=") for entry in text.split("\0") if entry)
    return {name: value for name, _, value in pairs} or None


def _read(pid: int, what: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:  # another user's, or it has ended
        return b""
