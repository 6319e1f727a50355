"""Where a run's files are: its place in storage, and the folder on this machine in which they are made."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.storage import StorageError, Store, open_store

logger = logging.getLogger(__name__)

MODEL, ADAPTER = "model", "adapter"
METRICS = "metrics.jsonl"
DATA_REPORT = "data_report.json"
_LAST = {"config.json", "adapter_config.json"}
"""Nothing opens the folder of a model, or of an adapter, without it."""


@dataclass(frozen=True)
class RunPlace:
    """A run's place: local, where ``folder`` is it, or ``gs://…``, where ``folder`` holds copies on their way."""

    store: Store
    folder: Path

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def is_local(self) -> bool:
        return not self.url.startswith("gs://")

    def fetch(self, name: str) -> None:
        """Make the local copy of a file what is stored, or absent where nothing is."""
        if self.is_local:
            return
        (self.folder / name).unlink(missing_ok=True)
        if self.store.stat(name):
            self.store.download(name, self.folder / name)

    def publish(self, name: str) -> None:
        """Store a file of the folder, if there is one; it may be growing meanwhile."""
        path = self.folder / name
        if not self.is_local and path.is_file():
            self.store.write(name, path.read_bytes())

    def publish_folder(self, name: str) -> None:
        """Store the files below a folder of the folder, if there are any; a fault is told and does not count."""
        if self.is_local:
            return
        try:
            for path in sorted(path for path in (self.folder / name).rglob("*") if path.is_file()):
                self.store.upload(path, path.relative_to(self.folder).as_posix())
        except (StorageError, ConfigError) as error:
            logger.warning("%s stays on this machine: %s", name, error)

    def has_exported(self, name: str) -> bool:
        """Whether the exported model or adapter is there, whole."""
        return any(self.store.stat(f"{name}/{last}") is not None for last in _LAST)

    @contextmanager
    def exported(self, name: str) -> Iterator[Path]:
        """A folder with the exported model or adapter, of this life or an earlier one's."""
        if self.is_local:
            yield self.folder / name
            return
        from numina_finetune.models.staged import STAGED

        stored = open_store(f"{self.url}/{name}")
        with TemporaryDirectory(prefix="numina-export-") as scratch:
            for file in stored.names():
                if file != STAGED:  # the bucket's own, no part of the model
                    stored.download(file, Path(scratch) / file)
            yield Path(scratch)

    def publish_exported(self, name: str) -> None:
        """Store the exported model or adapter."""
        if self.is_local:
            return
        store_model(self.folder / name, open_store(f"{self.url}/{name}"))
        logger.info("stored the %s in %s/%s", name, self.url, name)


def store_model(folder: Path, target: Store) -> None:
    """Store a model's or an adapter's files, in such an order that a part of them does not look like one.

    A model is recorded as ``numina-finetune stage`` does it, so that its address can be given as a model's name.
    """
    paths = sorted(folder.iterdir())
    for path in [path for path in paths if path.name not in _LAST]:
        target.upload(path, path.name)
    if any(path.name == "config.json" for path in paths):
        from numina_finetune.models.stage import record_of_folder  # loads much, and most only look for files
        from numina_finetune.models.staged import STAGED

        target.write_json(STAGED, record_of_folder(folder).to_json())
    for path in [path for path in paths if path.name in _LAST]:
        target.upload(path, path.name)


def exports_of(config: RunConfig) -> tuple[str, ...]:
    """The folders that the run leaves in its place at its end."""
    if not config.lora_rank:
        return (MODEL,)
    return {"merged": (MODEL,), "adapter": (ADAPTER,), "both": (MODEL, ADAPTER)}[config.lora_export]


def pushed_as(config: RunConfig) -> dict[str, str]:
    """Where on the hub each exported folder goes; an adapter beside a model goes beside it."""
    model_id, (first, *others) = config.hub_model_id or config.resolved_run_id, exports_of(config)
    return {first: model_id, **{name: f"{model_id}-{name}" for name in others}}


def open_place(config: RunConfig) -> RunPlace:
    """The place of the run that ``config`` describes.

    Raises:
        ConfigError: it is none that can be opened.
    """
    return RunPlace(open_store(config.run_url), config.run_dir)
