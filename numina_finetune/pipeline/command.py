"""``numina-finetune run``: a pipeline's file, checked as a whole, run to its end, and told of in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from numina_finetune import launch
from numina_finetune.checkpoint.attempts import Attempt, open_attempt
from numina_finetune.errors import ConfigError, ExitCode
from numina_finetune.pipeline.executor import Ended, alone_in, run_steps
from numina_finetune.pipeline.plan import Step, before_others, plan_steps
from numina_finetune.pipeline.records import StepRecord, read_step
from numina_finetune.pipeline.spec import PipelineSpec, is_name, load_pipeline
from numina_finetune.pipeline.works import KINDS
from numina_finetune.storage import open_store

_OUTCOMES = {
    ExitCode.DONE: "done",
    ExitCode.PREEMPTED: "preempted",
    ExitCode.STOPPED: "stopped",
    ExitCode.CONFIGURATION: "configuration",
    ExitCode.DIVERGED: "diverged",
}
"""As ``outcome.json`` names them; any other end is a crash."""


@dataclass(frozen=True)
class RunOptions:
    """What ``run`` was asked for."""

    pipeline: str
    """Its file."""
    output_dir: str = "runs"
    run_id: str | None = None
    """Instead of the name that the file gives."""
    only: str | None = None
    """The one step to run."""
    listed: bool = False
    """Only say how the steps stand."""


def run_pipeline(options: RunOptions) -> ExitCode:
    """Run what is not done.

    Raises:
        ConfigError: everything that is wrong with any of the steps, before the first one begins.
    """
    faults: list[str] = []
    spec, steps = load(options, faults)
    names = [step.name for step in spec.steps]
    if options.only is not None and options.only not in names:
        faults.append(f"--only {options.only} is no step: there are {', '.join(names)}")
    standing = {step.name: read_step(step) for step in steps}
    done = [step.name for step in steps if standing[step.name].is_done(step)]
    wanted = [step for step in steps if options.only in (None, step.name)]
    if options.only is not None:
        faults += [
            f"--only {options.only} needs the outputs of step {needed}, which is not done: run that one first"
            for step in wanted
            for needed in step.needs
            if needed not in done
        ]
    if options.listed:
        _refuse(faults)
        print(table(steps, standing, {}))
        return ExitCode.DONE
    pending = [step for step in wanted if step.name not in done]
    faults += _faults_seen_by_libraries(options.pipeline, spec, steps, pending, done)
    _refuse(faults)
    return _run(spec, wanted)


def load(options: RunOptions, faults: list[str]) -> tuple[PipelineSpec, list[Step]]:
    """The pipeline's file, and its steps in their places as far as they can be made out.

    Args:
        faults: takes what is wrong with the steps' options.

    Raises:
        ConfigError: what is wrong with the file's form.
    """
    spec = load_pipeline(options.pipeline, tuple(KINDS))
    if options.run_id is not None and not is_name(options.run_id):
        faults.append(f"--run-id {options.run_id!r} cannot name a folder: use letters, digits, - and _")
    spec = replace(spec, name=options.run_id or spec.name)
    folder = options.output_dir
    if not folder.startswith("gs://"):  # the same place for processes that are started elsewhere
        folder = str(Path(folder).expanduser().absolute())
    return spec, plan_steps(spec, f"{folder.rstrip('/')}/{spec.name}", options.pipeline, faults)


def table(steps: Sequence[Step], standing: Mapping[str, StepRecord], said: Mapping[str, str]) -> str:
    """For a person: a line for each step.

    Args:
        said: what to say of a step's state instead of its record's word, by name.
    """
    rows = [("step", "kind", "state", "lives", "seconds", "figures", "place")]
    for step in steps:
        record = standing[step.name]
        state = said.get(step.name, "done" if record.is_done(step) else record.state)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in record.figures.items())
        rows.append(
            (
                *(step.name, step.kind, state, str(len(record.lives)), f"{record.seconds:.0f}"),
                *(figures or "-", step.location.url),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _faults_seen_by_libraries(
    path: str, spec: PipelineSpec, steps: Sequence[Step], pending: Sequence[Step], done: Sequence[str]
) -> list[str]:
    """Of each step that is to run, what its own command would refuse before it begins."""
    by_name = {step.name: step for step in steps}
    written = {step.name: step for step in spec.steps}
    found = []
    for step in pending:
        work = before_others(written[step.name], spec, by_name, done)
        found += [f"{path}, step {step.name}: {fault}" for fault in work.faults_seen_by_libraries()]
    return found


def _run(spec: PipelineSpec, wanted: Sequence[Step]) -> ExitCode:
    first, root = launch.is_first_process(), wanted[0].location.root
    if not first:
        return run_steps(wanted, first=False, lock=None, say=_silent).code
    with alone_in(root) as lock:
        attempt = open_attempt(open_store(root))
        try:
            ended = run_steps(wanted, first=True, lock=lock, say=_say)
        except BaseException as error:
            _finish(attempt, Ended(ExitCode.CRASHED, (), repr(error)))
            raise
        _finish(attempt, ended)
    standing = {step.name: read_step(step) for step in wanted}
    said = {step.name: "done before" for step in wanted if step.name not in ended.worked} if not ended.code else {}
    print(f"\n{table(wanted, standing, said)}\n{spec.name}: {ended.reason}", flush=True)
    return ended.code


def _finish(attempt: Attempt, ended: Ended) -> None:
    """Tell supervisors."""
    attempt.finish(_OUTCOMES.get(ended.code, "crashed"), step=None, saved_step=None, reason=ended.reason)


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise ConfigError(dict.fromkeys(faults))


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(line: str) -> None:
    """What other processes than the first say."""
