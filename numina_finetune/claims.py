"""One process of several does a piece of work whose result all of them take from a store; the others wait for it.

A claim is an object that its holder rewrites from time to time: one that stands still is taken over. It only spares
work, so the work itself must bear being done twice. On one machine, a locked folder is surer: the kernel knows when its
holder has ended.
"""

from __future__ import annotations

import fcntl
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from numina_finetune.errors import ConfigError
from numina_finetune.storage import PreconditionFailed, StorageError, Store

logger = logging.getLogger(__name__)

LOCK_PATIENCE = 60.0
"""Seconds that what a killed process has started may take to save and end."""
_LOCK_POLL_SECONDS = 0.2


class Claim:
    """The word to the others that this process is at it."""

    def __init__(self, store: Store, name: str, seconds: float) -> None:
        """
        Args:
            name: of the claim's object.
            seconds: after so long without a sign of life a holder counts as dead. It gives one three times as often.
        """
        self.token = uuid.uuid4().hex
        self._store, self._name, self._seconds = store, name, seconds
        self._generation = 0
        self._ended = threading.Event()

    def take_unless(self, done: Callable[[], bool], poll_seconds: float) -> bool:
        """Wait for whoever is at it; True once the claim is this process's, False once ``done``."""
        seen, since = -1, 0.0
        while not done():
            # A claim's age is measured between an answer and a later question, on this process's clock alone.
            asked = time.monotonic()
            holder = self._store.stat(self._name)
            generation = holder.generation if holder else 0
            if generation != seen:
                if generation and seen <= 0:
                    logger.info("%s is another process's: waiting for it", self._store.address(self._name))
                seen, since = generation, time.monotonic()
            if generation and asked - since < self._seconds:
                time.sleep(poll_seconds)
            elif self._make(generation):
                if not done():
                    return True
                self._give_up()  # the holder before ended its work between the two looks
        return False

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Rewrites the claim from time to time; gives it up at the end, however that comes."""
        thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self._give_up()

    def _make(self, replaced: int) -> bool:
        """Whether the claim is made; ``replaced`` is the generation of the one it takes over, 0 for none."""
        facts = {"token": self.token, "host": socket.gethostname(), "time": time.time()}
        try:
            self._generation = self._store.write_json(self._name, facts, if_generation=replaced).generation
        except PreconditionFailed:
            return False
        return True

    def _give_up(self) -> None:
        try:
            self._store.delete(self._name, if_generation=self._generation)
        except PreconditionFailed:
            pass  # another's by now
        except (StorageError, ConfigError) as error:
            logger.warning("the claim could not be given up, others will wait for it to grow old: %s", error)

    def _beat(self) -> None:
        while not self._ended.wait(self._seconds / 3):
            try:
                if not self._make(self._generation):
                    logger.warning("%s was taken over by another process", self._store.address(self._name))
                    return
            except (StorageError, ConfigError) as error:
                logger.warning("the claim could not be renewed: %s", error)


@contextmanager
def lock_folder(folder: Path, name: str, others: str) -> Iterator[int]:
    """Keeps others out of the folder, until this process has ended and all that hold the lock's descriptor too.

    Args:
        name: of the file in the folder that is locked.
        others: who they are, as in "another sweep", for messages.

    Raises:
        ConfigError: another one stays in there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / name).open("w")
    except OSError as error:
        raise ConfigError(f"--output-dir {folder} cannot be used ({error.strerror}): give another folder") from error
    with file:
        patience, told = time.monotonic() + LOCK_PATIENCE, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > patience:
                    raise ConfigError(
                        f"--output-dir {folder}: {others} is at work there: wait for it, or give another folder"
                    ) from error
            if not told:
                logger.info("waiting: %s is at work in %s", others, folder)
                told = True
            time.sleep(_LOCK_POLL_SECONDS)
        yield file.fileno()
