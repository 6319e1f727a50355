"""The two kinds of place that checkpoints live in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from numina_finetune.storage import Store, open_store
from tests.gcs import Gcs, gcs


@pytest.fixture(scope="session")
def running() -> Iterator[Gcs]:
    with gcs() as service:
        os.environ.pop("STORAGE_EMULATOR_HOST")  # each test finds it through `service`, and no other test does
        yield service
        os.environ.update(service.environment)  # what `gcs` will take back


@pytest.fixture
def service(running: Gcs, native_here: None) -> Gcs:
    running.clear()
    os.environ.update(running.environment)  # until `native_here` restores the environment
    return running


@pytest.fixture
def cloud(service: Gcs, tmp_path: Path) -> Store:
    return open_store(f"{service.url}/{tmp_path.parent.name}-{tmp_path.name}", chunk_bytes=1 << 20, retry_seconds=15)


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return open_store(tmp_path / "run")


@pytest.fixture(params=["disk", "cloud"])
def store(request: pytest.FixtureRequest) -> Store:
    chosen: Store = request.getfixturevalue(request.param)
    return chosen
