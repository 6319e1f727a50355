"""A pipeline as what ``spot run`` keeps alive: one run, whose lives are the pipeline's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from numina_finetune.errors import ConfigError
from numina_finetune.pipeline.command import RunOptions, load
from numina_finetune.spot.options import SpotOptions
from numina_finetune.spot.training import here_faults


def checked_pipeline(options: SpotOptions, words: Sequence[str]) -> tuple[SpotOptions, list[str]]:
    """The supervisor's options with the run's name, and what is wrong with the pipeline.

    Args:
        words: ``run`` and the pipeline's file, as they stand behind the ``--``.
    """
    if len(words) != 2 or words[1].startswith("-"):
        return options, [f"after --: {' '.join(words)}: give run and the pipeline's file, and no option"]
    faults: list[str] = []
    try:
        asked = RunOptions(words[1], options.output_dir or ".", options.run_id or None)
        spec, steps = load(asked, faults)
    except ConfigError as error:
        return options, error.problems
    if not options.docker_image:
        faults += [f"step {step.name}: {fault}" for step in steps for fault in here_faults(step.work.named())]
    return replace(options, run_id=spec.name), faults
