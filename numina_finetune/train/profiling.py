"""``--profile-steps 10-15``: what the devices did in these optimizer steps, for TensorBoard or Perfetto."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numina_finetune.config import RunConfig
    from numina_finetune.train.backend import Backend

logger = logging.getLogger(__name__)

FOLDER = "profile"
"""In the run's folder."""


class ProfiledSteps:
    """Starts and stops the backend's profiler around the steps that were asked for."""

    def __init__(self, config: RunConfig, backend: Backend) -> None:
        self._steps, self._backend = config.profiled_steps, backend
        self._folder = config.run_dir / FOLDER
        self._running = False

    def before(self, step: int) -> None:
        """``step`` (the first one is 1) is about to begin."""
        if not self._running and step in self._steps:
            self._backend.start_profile(self._folder)
            self._running = True

    def after(self, step: int) -> None:
        """``step`` was dispatched."""
        if step + 1 not in self._steps:
            self.close()

    def close(self) -> None:
        """Stop, if it runs; waits for the device."""
        if self._running:
            self._backend.stop_profile()
            self._running = False
            logger.info("profile of steps %d to %d: %s", self._steps[0], self._steps[-1], self._folder)
