"""Set up ``.venv`` in the checkout and run something in it; needs nothing but Python 3.11.

    python3.11 scripts/bootstrap.py quickstart     install, then the quickstart
    python3.11 scripts/bootstrap.py test           install, then the tests
    python3.11 scripts/bootstrap.py check          install, then ruff, mypy and the tests
    python3.11 scripts/bootstrap.py docs           install, then the documentation's site, into site/
    python3.11 scripts/bootstrap.py install        install only

What follows the word goes to the command: ``… test -k packing``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
UV = "uv==0.13.8"
EXTRAS = "dev,docs,train"


def install() -> None:
    """Make or update ``.venv``; nothing to do where it already matches the pinned versions."""
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"Python 3.11 is needed, this is {sys.version.split()[0]}: run python3.11 {sys.argv[0]}")
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    ).hexdigest()
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == wanted:
        return
    if not PYTHON.is_file():
        venv.create(VENV, with_pip=True, clear=True)
    uv = shutil.which("uv")
    if uv is None:
        _run(str(PYTHON), "-m", "pip", "install", "--quiet", UV)
        uv = str(VENV / "bin" / "uv")
    constraints = str(ROOT / "constraints.txt")
    _run(uv, "pip", "install", "--python", str(PYTHON), "--constraint", constraints, "--editable", f"{ROOT}[{EXTRAS}]")
    STAMP.write_text(wanted, encoding="utf-8")


def main() -> None:
    action, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    tests = [str(PYTHON), "-m", "pytest", "-n", "2", *arguments]
    commands = {
        "install": [],
        "quickstart": [[str(PYTHON), "-m", "numina_finetune", "quickstart", *arguments]],
        "test": [tests],
        "docs": [[str(PYTHON), "-m", "mkdocs", "build", "--strict", *arguments]],
        "check": [
            [str(PYTHON), "-m", "ruff", "check", "."],
            [str(PYTHON), "-m", "ruff", "format", "--check", "."],
            [str(PYTHON), "-m", "mypy"],
            tests,
        ],
    }
    if action not in commands:
        sys.exit(__doc__)
    install()
    for command in commands[action]:
        _run(*command)


def _run(*command: str) -> None:
    """Run a command in the checkout; its failure is ours."""
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "VIRTUAL_ENV": str(VENV)}, check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
