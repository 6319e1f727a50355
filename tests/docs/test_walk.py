"""The README's walk, from an empty folder to a model that answers, each command copied from the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.docs.pages import blocks

BEFORE = ("python3.11 scripts/bootstrap.py", "source ")
"""How its lines begin that install the package, which the tests' own environment has."""


@pytest.mark.slow
def test_a_stranger_gets_from_nothing_to_a_model_that_answers(tmp_path: Path) -> None:
    (walk,) = (block for block in blocks("bash") if "generate --model runs/first/model" in block.text)
    typed = [line for line in walk.text.splitlines() if not line.startswith(BEFORE)]
    script = ["set -e", f'numina-finetune() {{ "{sys.executable}" -m numina_finetune "$@"; }}', *typed]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env=environment(HOME=str(tmp_path), PATH=os.environ["PATH"]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert (tmp_path / "runs" / "first" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    assert (tmp_path / "results" / "first" / "report.html").is_file()
    assert re.search(r"^#### -?\d+$", done.stdout.rpartition("the report is")[2], re.MULTILINE), done.stdout[-1000:]
