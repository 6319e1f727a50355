"""What a run was made with: library versions, the user's own commit, and settings without secrets."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_GIT_SECONDS = 10.0
_SECRETS = (
    (re.compile(r"(?<=://)[^/@\s]+@"), "***@"),  # user:password@ of an address
    (re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{16,}"), "***"),  # tokens that show what they are
    (re.compile(r"(?i)((?:token|password|secret|api_?key|signature)=)[^&\s]+"), r"\1***"),  # of a query
)


def versions() -> dict[str, str]:
    """Of the interpreter and the libraries that decide the numbers."""
    names = ("numina_finetune", "torch", "torch_xla", "transformers", "accelerate", "datasets", "tokenizers")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """The commit of the project that ``folder`` (by default, where the user is) belongs to; None where there is none.

    ``dirty``: tracked files differ from it. Files that git does not track, such as runs, do not count.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def redacted(value: Any) -> Any:
    """Plain data with what looks like a secret in its texts replaced by ``***``."""
    if isinstance(value, dict):
        return {name: redacted(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(each) for each in value]
    if isinstance(value, str):
        for pattern, replacement in _SECRETS:
            value = pattern.sub(replacement, value)
    return value


def _git(folder: Path | None, *arguments: str) -> str | None:
    """What git answers; None where it cannot."""
    try:
        result = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
