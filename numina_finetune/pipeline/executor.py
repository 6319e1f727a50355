"""The steps in turn, each as a process of its own, each until it is done once.

Where several processes run the same pipeline together (one a host, or one a device), every one of them starts the
commands that work together; the others are the first process's, and the rest waits for its record in the shared place.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from numina_finetune.claims import LOCK_PATIENCE, Claim, lock_folder
from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.launch import environment_of_command
from numina_finetune.pipeline.plan import Step
from numina_finetune.pipeline.records import StepRecord, read_step, write_step
from numina_finetune.process_tree import Children, exit_code_of
from numina_finetune.storage import open_store

LOCK, CLAIM = "pipeline.lock", "pipeline.claim"
CLAIM_SECONDS = 60.0
"""Without a sign of life in a bucket, after which a pipeline counts as dead."""
POLL_SECONDS = 1.0
_OTHERS = "another run of this pipeline, or a step of one,"


@dataclass(frozen=True)
class Ended:
    """How the pipeline ended.

    Attributes:
        worked: names of the steps that this run worked at.
        reason: of the end, for the record.
    """

    code: ExitCode
    worked: Sequence[str]
    reason: str


def run_steps(steps: Sequence[Step], *, first: bool, lock: int | None, say: Callable[[str], None]) -> Ended:
    """Run what is not done, until all is done, a step fails, or a notice comes, which the step at hand gets too.

    Args:
        first: this is the first of the processes that run the pipeline together.
        lock: as `alone_in` gives it.
    """
    worked: list[str] = []
    children = Children(lock)
    with children.listening(), tempfile.TemporaryDirectory(prefix="numina-pipeline-") as scratch:
        for number, step in enumerate(steps, 1):
            if children.noticed is not None:
                return Ended(children.noticed, worked, f"stopped before step {step.name}")
            record = read_step(step)
            if record.is_done(step):
                say(f"[{number}/{len(steps)}] {step.name}: done before, {step.location.url}")
                continue
            say(f"[{number}/{len(steps)}] {step.name}: {step.kind}, {step.location.url}")
            worked.append(step.name)
            command = partial(_run, children, step.work.words(Path(scratch)), number)
            code = _work_at(step, record, command) if first else _work_with(step, command, children)
            if code != ExitCode.DONE:
                return Ended(children.noticed or code, worked, f"step {step.name} ended with exit code {int(code)}")
    return Ended(ExitCode.DONE, worked, "all steps are done")


@contextmanager
def alone_in(root: str) -> Iterator[int | None]:
    """Keeps other runs of the pipeline out of its place; gives a descriptor that its steps shall hold too, if any.

    Raises:
        ConfigError: another one stays in there.
    """
    if not root.startswith("gs://"):
        with lock_folder(Path(root), LOCK, _OTHERS) as descriptor:
            yield descriptor
        return
    limit = time.monotonic() + CLAIM_SECONDS + LOCK_PATIENCE
    claim = Claim(open_store(root), CLAIM, CLAIM_SECONDS)
    if not claim.take_unless(lambda: time.monotonic() > limit, POLL_SECONDS):
        raise ConfigError(f"{root}: {_OTHERS} is at work there: wait for it, or give another --output-dir")
    with claim.kept_alive():
        yield None


def _run(children: Children, words: Sequence[str], number: int) -> ExitCode:
    return exit_code_of(children.start(words, environment=environment_of_command(number)).wait())


def _work_at(step: Step, record: StepRecord, command: Callable[[], ExitCode]) -> ExitCode:
    """Run the step's command, and record that it began and how it ended; the first process's part."""
    record = record.begun()
    if step.work.remade:
        _clear(step)
    write_step(step, record)
    code = command()
    record = record.ended(code)
    if code == ExitCode.DONE:
        record = record.done(step.outputs, step.work.figures(open_store(step.location.url)))
    write_step(step, record)
    return code


def _work_with(step: Step, command: Callable[[], ExitCode], children: Children) -> ExitCode:
    """Take part in the step's command, if it is for all, and wait until the first process has recorded its end."""
    code = ExitCode.DONE if step.work.alone else command()
    while code == ExitCode.DONE and not read_step(step).is_done(step):
        if children.noticed is not None:
            return children.noticed
        time.sleep(POLL_SECONDS)
    return code


def _clear(step: Step) -> None:
    """Delete what a command that was cut off has left, which it would not write over."""
    store = open_store(step.location.url)
    for where in step.work.outputs.values():
        for name in store.names(f"{where}/"):
            store.delete(name)
