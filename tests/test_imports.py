"""The house's import rules (docs: one way down, each device library behind one door), read from the source."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment

PACKAGE = ROOT / "numina_finetune"


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from a import b` may name the module a.b; a relative one starts at the module's own package.
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def offenders(files: list[Path], *forbidden: str) -> list[str]:
    """``file imports name`` for each import of something forbidden, or of something inside it."""
    return sorted(
        {
            f"{path.relative_to(ROOT)} imports {name}"
            for path in files
            for name in imports(path)
            if any(name == one or name.startswith(f"{one}.") for one in forbidden)
        }
    )


def room(name: str) -> list[Path]:
    files = sorted((PACKAGE / name).rglob("*.py"))
    assert files, f"there is no {name}/"
    return files


def house(*, outside: str) -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not path.is_relative_to(PACKAGE / outside)]


def own(*rooms: str) -> list[str]:
    return [f"numina_finetune.{name}" for name in rooms]


def test_only_the_xla_room_knows_the_device_library() -> None:
    assert offenders(house(outside="xla"), "torch_xla", "libtpu") == []
    assert offenders(room("xla"), "torch_xla"), "the check sees what is there"


def test_only_the_spot_room_starts_gcloud() -> None:
    """Its own command lines; messages elsewhere may tell a person what to type."""
    started = [
        path for path in sorted(PACKAGE.rglob("*.py")) if re.search(r"[\"']gcloud[\"']", path.read_text("utf-8"))
    ]
    assert [path.parent.name for path in started] == ["spot"] * len(started) and started


def test_only_the_xla_room_and_the_tpus_compiler_know_jax() -> None:
    compiler = PACKAGE / "plan" / "compiler.py"
    assert offenders([path for path in house(outside="xla") if path != compiler], "jax", "jaxlib") == []


def test_the_tpus_compiler_runs_without_this_package() -> None:
    assert offenders([PACKAGE / "plan" / "compiler.py"], "numina_finetune") == []


def test_what_runs_in_the_sandbox_knows_nothing_but_python() -> None:
    folder = room("evaluation/sandbox/inside")
    named = {
        name
        for path in folder
        for name in imports(path)
        if not name.startswith("numina_finetune.evaluation.sandbox.inside")
    }
    assert {name.partition(".")[0] for name in named} <= sys.stdlib_module_names


def test_only_storage_knows_google_cloud() -> None:
    assert offenders(house(outside="storage.py"), "google.cloud") == []


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("data", ["torch", "accelerate", *own("models", "train", "xla", "torch_native", "checkpoint")]),
        ("models", own("train", "xla", "torch_native", "evaluation", "data.loader")),
        ("train", own("xla", "torch_native", "evaluation", "cli")),
        ("checkpoint", own("train", "models", "xla", "torch_native", "evaluation", "cli")),
        ("spot", ["torch", "accelerate", *own("train", "models", "xla", "torch_native", "evaluation", "cli")]),
        ("evaluation", own("xla", "torch_native", "cli")),
        ("run_report", own("xla", "torch_native", "evaluation", "sweep", "cli")),
        ("sweep", own("xla", "torch_native", "evaluation", "cli")),
        ("pipeline", own("xla", "torch_native", "cli", "sweep", "plan")),
        ("plan", own("xla", "torch_native", "evaluation", "checkpoint", "cli")),
        ("doctor", own("xla", "torch_native", "train", "checkpoint", "evaluation", "cli")),
        ("xla", own("torch_native", "cli")),
        ("torch_native", own("xla", "cli")),
    ],
)
def test_imports_run_one_way(name: str, forbidden: list[str]) -> None:
    assert offenders(room(name), *forbidden) == []


@pytest.mark.parametrize(
    "name",
    [
        "checks.py",
        "config.py",
        "errors.py",
        "files.py",
        "mesh.py",
        "metadata.py",
        "option_fields.py",
        "process_tree.py",
        "storage.py",
        "stores.py",
    ],
)
def test_the_ground_floor_imports_no_room(name: str) -> None:
    rooms = own("cli", "data", "models", "train", "xla", "torch_native", "checkpoint", "evaluation", "spot", "plan")
    rooms += own("run_report", "sweep", "pipeline")
    assert offenders([PACKAGE / name], *rooms) == []


def loaded_by(module: str) -> set[str]:
    """All modules that a new process has loaded once it has imported ``module``."""
    script = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(result.stdout))
    assert module in loaded
    return loaded


def test_the_command_line_answers_before_it_loads_a_device_library() -> None:
    loaded = loaded_by("numina_finetune.cli")
    assert not loaded & {"torch_xla", "accelerate", "transformers", "torch", "datasets"}


@pytest.mark.parametrize("room", ["sweep", "pipeline"])
def test_what_starts_trainings_leaves_the_devices_to_them(room: str) -> None:
    assert not loaded_by(f"numina_finetune.{room}.command") & {"torch_xla", "accelerate", "transformers"}
