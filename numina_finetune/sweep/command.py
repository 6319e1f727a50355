"""``numina-finetune sweep``: a training at several learning rates, to a ranked table."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numina_finetune import launch
from numina_finetune.checks import config_faults
from numina_finetune.config import RunConfig
from numina_finetune.errors import CheckpointError, ConfigError, ExitCode, UserError
from numina_finetune.option_fields import flag
from numina_finetune.storage import NotFound, open_store
from numina_finetune.sweep.divergence import Criteria
from numina_finetune.sweep.report import PICTURE, RESULTS, command_of, draw, results_of, table_of
from numina_finetune.sweep.runner import Runner, sweep_lock
from numina_finetune.sweep.standing import Standing, standing_of
from numina_finetune.sweep.trials import Trial, parse_rates, trials_of
from numina_finetune.train.record import check_output, setting_differences

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepOptions:
    """What the sweep itself was asked for."""

    rates: str
    """As `parse_rates` reads them."""
    parallel: int = 1
    criteria: Criteria = field(default_factory=Criteria)


def run_sweep(options: SweepOptions, base: RunConfig, words: Sequence[str], faults: Sequence[str]) -> ExitCode:
    """Run what has not finished yet, rank what has, and say which rate won.

    Args:
        base: what the options that were passed through make of a training.
        words: these options.
        faults: what is known to be wrong with them besides.

    Raises:
        ConfigError, CheckpointError: all that is wrong, before any trial begins.
    """
    trials = _checked(options, base, words, faults)
    with sweep_lock(base.run_dir.parent) as lock:
        trials = [*trials, *_earlier(trials, base, words)]
        trials.sort(key=lambda trial: trial.rate)
        return _run(options, base, trials, Runner(lock, options.criteria))


def common_settings(base: RunConfig) -> dict[str, Any]:
    """What makes the trials of a sweep the same training."""
    return {name: value for name, value in base.identity().items() if name != "learning_rate"}


def _run(options: SweepOptions, base: RunConfig, trials: Sequence[Trial], runner: Runner) -> ExitCode:
    standings = {trial.rate: standing_of(trial) for trial in trials}
    for standing in standings.values():
        if standing.finished:
            logger.info("%s: %s before, not run again", standing.name, standing.outcome)
    pending = [trial for trial in trials if not standings[trial.rate].finished]

    def write() -> dict[str, Any]:
        results = results_of(trials, list(standings.values()), common_settings(base))
        open_store(base.output_dir).write_json(RESULTS, results)
        return results

    def ended(standing: Standing) -> None:
        standings[standing.rate] = standing
        write()

    code = ExitCode.DONE
    with runner.listening():
        if pending:
            if (prepared := runner.prepare(pending[0])) and runner.signal is None:
                return ExitCode(prepared) if prepared in set(ExitCode) else ExitCode.CRASHED
            if base.dry_run:
                print("\n".join(f"would run: {command_of(trial)}" for trial in pending))
                return ExitCode.DONE
            write()
        code = runner.run(pending, parallel=options.parallel, ended=ended)
        results = write()
        open_store(base.output_dir).write(PICTURE, draw(trials, list(standings.values())))
    print(f"\n{table_of(list(standings.values()))}\n{results['advice']}")
    print(f"{open_store(base.output_dir).address(RESULTS)} has the figures, {PICTURE} beside it the curves")
    if results["winner"]:
        print(f"the winner's command:\n  {results['winner']['command']}")
    if code == ExitCode.DONE and results["winner"] is None:
        return ExitCode.FAULTS_FOUND
    return code


def _checked(options: SweepOptions, base: RunConfig, words: Sequence[str], known: Sequence[str]) -> list[Trial]:
    """The trials, or everything that is wrong."""
    faults = list(known)
    rates: Sequence[float] = ()
    try:
        rates = parse_rates(options.rates)
    except ConfigError as error:
        faults += error.problems
    if options.parallel < 1:
        faults.append(f"--parallel {options.parallel} is too small: use 1 or more")
    criteria = options.criteria
    if criteria.factor != 0 and not criteria.factor > 1:
        faults.append(f"--diverge-factor {criteria.factor:g} is out of range: use more than 1, or 0 for never")
    if criteria.steps < 1:
        faults.append(f"--diverge-steps {criteria.steps} is too small: use 1 or more")
    wish = base.resume_from_checkpoint
    if wish == "none" or wish.isdecimal():
        faults.append(
            f"--resume-from-checkpoint {wish}: a sweep run again resumes its interrupted trials: leave it out"
        )
    backend, _ = launch.choose_backend(base)
    devices = launch.device_count(backend)
    if options.parallel > 1 and backend == "xla" and devices is None:
        faults.append(
            f"--parallel {options.parallel}: one process drives all of a host's TPU chips: run the trials one after "
            "another"
        )
    faults += config_faults(base)
    if faults:
        raise ConfigError(dict.fromkeys(faults))
    trials = trials_of(base, words, rates)
    for trial in trials:
        try:
            check_output(trial.config)
        except UserError as error:
            faults += error.problems
    faults += _other_sweep(base)
    if faults:
        raise CheckpointError(dict.fromkeys(faults))
    return trials


def _results(base: RunConfig) -> Mapping[str, Any] | None:
    """What an earlier sweep wrote into the folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    store = open_store(base.output_dir)
    try:
        results: dict[str, Any] = json.loads(store.read(RESULTS))
        return {"training": dict(results["training"]), "trials": [float(each["rate"]) for each in results["trials"]]}
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{store.address(RESULTS)} is not what a sweep wrote: move it away") from error


def _other_sweep(base: RunConfig) -> list[str]:
    earlier = _results(base)
    if earlier is None:
        return []
    return [
        f"--output-dir {base.output_dir} holds a sweep with {name} {old!r}, this one has {new!r}: restore it, or give "
        "another --output-dir"
        for name, old, new in setting_differences(earlier["training"], common_settings(base))
    ]


def _earlier(trials: Sequence[Trial], base: RunConfig, words: Sequence[str]) -> list[Trial]:
    """What an earlier sweep in this folder has finished at other rates: it is ranked with the rest."""
    earlier = _results(base)
    own = {trial.rate for trial in trials}
    others = trials_of(base, words, [rate for rate in (earlier["trials"] if earlier else ()) if rate not in own])
    return [trial for trial in others if standing_of(trial).finished]


def passed_faults(given: Mapping[str, Any]) -> list[str]:
    """What may not stand among the options that are passed through.

    Args:
        given: the options by name, None where they are not given.
    """
    reasons = {
        "learning_rate": "the sweep sets it: give the rates to --lrs",
        "run_id": "each trial has a name of its own: give the sweep an --output-dir",
        "hub_model_id": "every trial would push to it: push the best one with `numina-finetune export`",
    }
    return [f"{flag(name)} {given[name]}: {why}" for name, why in reasons.items() if given.get(name) is not None]
