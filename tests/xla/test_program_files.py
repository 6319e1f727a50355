"""Compiled programs as files: what the next attempt finds, and what it does not believe."""

from __future__ import annotations

from pathlib import Path

import pytest

from numina_finetune.storage import open_store
from numina_finetune.xla import program_files
from numina_finetune.xla.program_files import ProgramFiles


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "machine", tmp_path / "run"


def files(places: tuple[Path, Path], process: int = 0) -> ProgramFiles:
    stores = [open_store(place) for place in places]
    return ProgramFiles(stores, stores if process == 0 else stores[:1], process)


def test_another_machine_finds_a_program_with_the_run_and_keeps_it(places: tuple[Path, Path], tmp_path: Path) -> None:
    first = files(places)
    first.keep("step", b"program" * 1000)
    first.settle(10)
    replaced = (tmp_path / "replaced", places[1])
    second = files(replaced, process=1)
    assert second.find("step") == b"program" * 1000
    second.settle(10)
    assert (replaced[0] / "programs" / "step").is_file()
    assert files(replaced).find("other") is None


def test_only_the_first_process_writes_into_the_run(places: tuple[Path, Path]) -> None:
    other = files(places, process=1)
    other.keep("step", b"program")
    other.settle(10)
    assert (places[0] / "programs" / "step").is_file() and not (places[1] / "programs").exists()


@pytest.mark.parametrize("damage", [b"", b"numina program 1\n", b"other", None])
def test_a_damaged_program_is_deleted_and_not_believed(places: tuple[Path, Path], damage: bytes | None) -> None:
    first = files(places)
    first.keep("step", b"program")
    first.settle(10)
    for place in places:
        path = place / "programs" / "step"
        content = path.read_bytes()
        # Written as a store writes, so that nothing but the content tells.
        open_store(place).write("programs/step", content[:-5] + b"XXXXX" if damage is None else damage)
    assert files(places).find("step") is None
    assert not any((place / "programs" / "step").exists() for place in places)


def test_an_attempt_that_ended_while_reading_is_remembered_once(places: tuple[Path, Path]) -> None:
    files(places).trying("step").__enter__()  # and never leaves
    with files(places, process=1).trying("step") as of_another_process:
        assert of_another_process
    with files(places).trying("step") as first:
        assert not first
    with files(places).trying("step") as first:
        assert first


def test_storage_that_refuses_costs_a_line_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    refused = files((tmp_path / "file" / "machine", tmp_path / "file" / "run"))
    refused.keep("one", b"1")
    refused.keep("two", b"2")
    refused.settle(10)
    assert refused.find("one") is None
    with refused.trying("one") as first:
        assert first
    assert len(caplog.messages) == 1 and "cannot be kept for the next attempt" in caplog.text


def test_the_machines_folder_does_not_grow_without_end(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_files, "MACHINE_BYTES", 200)
    kept = files(places)
    for number in range(4):
        kept.keep(f"step-{number}", bytes([number]) * 10)
        kept.settle(10)
    left = sorted(path.name for path in (places[0] / "programs").iterdir())
    assert left and left[-1] == "step-3" and "step-0" not in left
    assert len(list((places[1] / "programs").iterdir())) == 4
