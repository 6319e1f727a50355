"""A resumed attempt reads back what an earlier one compiled, on a real device library driven by torch_xla."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from numina_finetune.storage import open_store
from numina_finetune.xla.program_files import packed
from tests.conftest import environment
from tests.programs import run_module

pytest.importorskip("xla_plugins.xla_cpu_pjrt", reason="XLA's CPU library is not here: pip install '.[programs]'")
pytestmark = pytest.mark.slow


def attempt(folder: Path, *how: str) -> dict[str, Any]:
    result = run_module("tests.xla.kept_programs", str(folder), *how, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(json.loads((folder / "found.json").read_text(encoding="utf-8")))


def test_a_later_attempt_reads_back_what_the_first_compiled_and_computes_the_same(tmp_path: Path) -> None:
    first = attempt(tmp_path)
    assert first["on"] and not first["read_back"] and not first["told"]
    assert first["seconds"] > 0
    kept = sorted(path.name for path in (tmp_path / "run" / "programs").iterdir() if path.is_file())
    assert kept

    shutil.rmtree(tmp_path / "machine")  # another machine takes over the run
    second = attempt(tmp_path)
    assert second["read_back"] == len(kept) and not second["told"]
    assert second["sum"] == first["sum"]

    # A program whole in storage that the library does not take, and one whose reader died.
    broken = tmp_path / "run" / "programs" / kept[0]
    for place in (tmp_path / "machine" / "numina_finetune", tmp_path / "run"):
        open_store(place).write(f"programs/{kept[0]}", packed(b"no program"))
    open_store(tmp_path / "run").write(f"programs/trying/{kept[-1]}-0", b"")
    third = attempt(tmp_path)
    assert third["sum"] == first["sum"]
    assert sum("compiled anew" in line for line in third["told"]) == min(len(kept), 2)
    assert broken.stat().st_size > 100  # replaced by what was compiled


def test_a_library_that_reads_nothing_back_costs_one_line(tmp_path: Path) -> None:
    found = attempt(tmp_path, "broken")
    assert not found["on"] and found["sum"] > 0
    assert len(found["told"]) == 1 and "every attempt compiles anew" in found["told"][0]
    assert not list((tmp_path / "run" / "programs").rglob("*-0"))  # no mark is left
