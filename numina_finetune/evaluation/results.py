"""The folder of an evaluation: what was asked for, a line a problem, the figures; in a folder here or in ``gs://``.

``problems.jsonl`` grows as batches finish, and a killed evaluation goes on behind its last whole line.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numina_finetune.errors import ConfigError
from numina_finetune.evaluation.scoring import Record
from numina_finetune.files import write_text
from numina_finetune.storage import Damaged, NotFound, Store, open_store
from numina_finetune.train.place import RunPlace

logger = logging.getLogger(__name__)

SETTINGS, PROBLEMS, SUMMARY = "evaluation.json", "problems.jsonl", "summary.json"
REPORTS = ("report.md", "report.html")
PUBLISH_SECONDS = 30.0
"""Between two copies of ``problems.jsonl`` to a bucket, which takes whole objects only."""


@dataclass(frozen=True)
class Results:
    """What an evaluation left."""

    url: str
    settings: Mapping[str, Any]
    records: list[Record]
    summary: Mapping[str, Any] | None
    """None where it is not finished."""


class ResultFolder:
    """An evaluation's folder while it is being filled, by one process."""

    def __init__(self, url: str) -> None:
        key = hashlib.sha256(url.encode()).hexdigest()[:16]
        here = Path(tempfile.gettempdir()) / "numina-evaluations" / key
        local = here if url.startswith("gs://") else Path(url).expanduser()
        self._place = RunPlace(open_store(url), local)
        self._published = time.monotonic()

    def refuse_other(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder that holds an evaluation with other settings.

        Raises:
            ConfigError: naming both values of each.
        """
        found = _read_json(self._place.store, SETTINGS)
        if found is None:
            if self._place.store.stat(PROBLEMS) is not None:
                raise ConfigError(f"{self._place.url} has {PROBLEMS} but no {SETTINGS}: give another --output-dir")
            return
        then = found.get("settings", {})
        faults = [
            f"--output-dir {self._place.url} holds an evaluation with {name} {then.get(name)!r}, this command has "
            f"{settings.get(name)!r}: restore it to go on, or give another --output-dir"
            for name in {**then, **settings}
            if then.get(name) != settings.get(name)
        ]
        if faults:
            raise ConfigError(faults)

    def begin(self, settings: Mapping[str, Any], versions: Mapping[str, str]) -> list[Record]:
        """Write the settings where there are none; the records that are there already.

        Call :meth:`refuse_other` before.
        """
        if self._place.store.stat(SETTINGS) is None:
            self._place.store.write_json(SETTINGS, {"settings": dict(settings), "versions": dict(versions)})
        self._place.folder.mkdir(parents=True, exist_ok=True)
        self._place.fetch(PROBLEMS)
        path = self._place.folder / PROBLEMS
        if not path.is_file():
            return []
        text = path.read_text(encoding="utf-8")
        records, whole = _records(text)
        if whole != text:
            logger.info("dropped an incomplete line of %s", path)
            write_text(path, whole)
        return records

    def append(self, records: Sequence[Record]) -> None:
        """Add the records, durably; a bucket gets them some time later, in :meth:`publish` at the latest."""
        with (self._place.folder / PROBLEMS).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record.to_mapping(), ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        if time.monotonic() - self._published > PUBLISH_SECONDS:
            self.publish()

    def publish(self) -> None:
        """Store what has been appended."""
        self._place.publish(PROBLEMS)
        self._published = time.monotonic()

    def finish(self, summary: Mapping[str, Any], reports: Mapping[str, str]) -> None:
        """Write the summary and the reports, by name."""
        self.publish()
        for name, text in reports.items():
            self._place.store.write(name, text.encode())
        self._place.store.write_json(SUMMARY, dict(summary))


def read_results(url: str) -> Results:
    """An evaluation's folder.

    Raises:
        ConfigError: it is none.
    """
    store = open_store(url)
    described = _read_json(store, SETTINGS)
    if described is None:
        raise ConfigError(f"{url} holds no evaluation (no {SETTINGS}): give the --output-dir of an evaluate")
    try:
        text = store.read(PROBLEMS, start=0).decode()  # as a part, since it may be growing: no checksum would hold
    except NotFound:
        text = ""
    return Results(store.url, described["settings"], _records(text)[0], _read_json(store, SUMMARY))


def _records(text: str) -> tuple[list[Record], str]:
    """The records of whole lines, and these lines; the last one may have been cut off by a kill."""
    records, kept = [], []
    for line in text.splitlines(keepends=True):
        try:
            records.append(Record.from_mapping(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            continue
        kept.append(line if line.endswith("\n") else line + "\n")
    return records, "".join(kept)


def _read_json(store: Store, name: str) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(store.read(name))
    except NotFound:
        return None
    except (Damaged, ValueError) as error:
        raise ConfigError(f"{store.address(name)} is damaged ({error}): give another --output-dir") from error
    return value
