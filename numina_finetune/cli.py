"""The command line: ``numina-finetune`` trains; its options are the fields of ``RunConfig``."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from numina_finetune import __version__, launch
from numina_finetune.cli_options import command_of, field_parameter, parameter, resolve_config, with_parameters
from numina_finetune.config import BACKENDS, RunConfig
from numina_finetune.errors import ConfigError, ExitCode, UserError
from numina_finetune.evaluation.options import EvaluateOptions
from numina_finetune.spot.options import SpotOptions

DEFAULT_COMMAND = "train"


class _DefaultCommandGroup(TyperGroup):
    """``numina-finetune --dataset-name …`` means ``numina-finetune train --dataset-name …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help", "-h", "--version"):
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


_CONTEXT = {
    # Hugging Face users type --max_steps as often as --max-steps.
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}

app = typer.Typer(
    cls=_DefaultCommandGroup,
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings=_CONTEXT,
    help=(
        "Fine-tune language models for mathematics on TPUs, GPUs and CPUs. "
        "Without a command: train, whose options `numina-finetune train --help` lists."
    ),
)


_Run = Annotated[str, typer.Argument(metavar="RUN", help="The run's folder, or gs://bucket/prefix/run-id.")]


def main() -> None:
    """Entry point of the console script, of ``python -m numina_finetune``, and of the launchers' scripts."""
    launch.stop_with_launcher()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("numina_finetune").setLevel(logging.INFO)
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; a user's fault is one message, never a traceback."""
    try:
        code = app(args=list(arguments), prog_name="numina-finetune", standalone_mode=False)
        return int(code or 0)
    except UserError as error:
        print(f"numina-finetune: {error}", file=sys.stderr, flush=True)
        return int(error.exit_code)
    except TyperException as error:  # an option that does not exist, or a value of the wrong type
        print(f"numina-finetune: {error.format_message()} (see --help)", file=sys.stderr, flush=True)
        return int(ExitCode.CONFIGURATION)
    except KeyboardInterrupt:
        return int(ExitCode.STOPPED)
    except typer.Exit as stop:
        return int(stop.exit_code)


def _train(config: str | None, **given: Any) -> int:
    """Fine-tune a model; the same command again resumes."""
    faults: list[str] = []
    run_config = resolve_config(config, given, faults)
    name, reason = launch.choose_backend(run_config)
    launch.prepare_environment(name)

    from numina_finetune.checkpoint.preemption import StopNotice
    from numina_finetune.evaluation import in_loop
    from numina_finetune.train.run import check, train

    with StopNotice(run_config.preemption_grace) as notice:
        try:
            check(run_config, name)
        except ConfigError as error:
            faults += error.problems
        faults += in_loop.faults(run_config)
        if faults:
            raise ConfigError(dict.fromkeys(faults))  # the same dataset twice is the same fault once
        if run_config.metadata_url != "none":
            notice.watch_metadata(run_config.metadata_url, can_migrate=not launch.tpu_attached())
        if os.environ.get("RANK", "0") == "0":
            print(f"backend {name} ({reason})", flush=True)
        return int(train(run_config, _backend_factory(name), notice, in_loop.make_evaluator))


def _prepare(config: str | None, **given: Any) -> int:
    """Fill the cache with the tokenised data, and say what came of the rows."""
    from numina_finetune.data_commands import run_prepare

    return int(run_prepare(_data_config(config, given)))


def _check(config: str | None, **given: Any) -> int:
    """Look for benchmarks' questions in the data (--against); exit code 3 if there are any and they stay."""
    from numina_finetune.data_commands import run_check

    return int(run_check(_data_config(config, given)))


def _preview(config: str | None, rows: int | None, color: bool | None, ids: bool | None, **given: Any) -> int:
    """Print the first rows of each dataset as the model will see them; targets are coloured."""
    from numina_finetune.data_commands import run_preview

    colored = color if color is not None else sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return int(run_preview(_data_config(config, given), rows or 3, color=colored, show_ids=bool(ids)))


def _report(config: str | None, report_dir: str | None, **given: Any) -> int:
    """Write counts by source and reason, lengths (also as a picture), and the first quarantined rows."""
    from numina_finetune.data_commands import run_report

    return int(run_report(_data_config(config, given), Path(report_dir or "data-report")))


def _spot_run(training: list[str] | None, **given: Any) -> int:
    """Keep a training on spot TPUs alive until it is done; its own options stand after --. Given again, it goes on."""
    from numina_finetune.spot import commands

    options = SpotOptions.from_mapping({name: value for name, value in given.items() if value is not None})
    words = training or []
    options, faults = _checked_training(options, words)
    return int(commands.run(options, words, faults=faults))


def _checked_training(options: SpotOptions, words: list[str]) -> tuple[SpotOptions, list[str]]:
    """The options with the run's name, and what is wrong with the training's: before a machine costs anything."""
    from numina_finetune.spot.training import training_faults

    faults: list[str] = []
    if options.output_dir and not options.output_dir.startswith("gs://"):
        faults.append(
            f"--output-dir {options.output_dir} is of this computer: give gs://bucket/prefix, which the workers see too"
        )
    try:
        given = _training_options(words)
        config = resolve_config(given.pop("config"), given, faults)
    except TyperException as error:
        return options, [*faults, f"after --: {error.format_message()}"]
    except ConfigError as error:
        return options, [*faults, *error.problems]
    config = replace(config, output_dir=options.output_dir or ".", run_id=options.run_id or None)
    named = replace(options, run_id=config.resolved_run_id)
    return named, [*faults, *training_faults(config, in_image=bool(options.docker_image))]


def _training_options(words: Sequence[str]) -> dict[str, Any]:
    """The options of a training by name, None where one is not given.

    Raises:
        TyperException: an option that does not exist, or a value of the wrong type.
    """
    train: Any = typer.main.get_command(app)
    given: dict[str, Any] = (
        train.commands[DEFAULT_COMMAND].make_context(DEFAULT_COMMAND, list(words), **_CONTEXT).params
    )
    return given


def _plan(
    config: str | None,
    tpu: str | None,
    json: bool | None,
    max_compilations: int | None,
    prices: str | None,
    region: str | None,
    **given: Any,
) -> int:
    """Compile the training step for a TPU without a TPU: does it fit, what does it cost; exit code 3 if it does not."""
    launch.prepare_environment("native")
    faults: list[str] = []
    run_config = resolve_config(config, given, faults)
    from numina_finetune.plan.command import Request, run_plan

    asked = Request(
        tpu or "",
        as_json=bool(json),
        max_compilations=max_compilations,
        prices=Path(prices) if prices else None,
        region=region,
    )
    return int(run_plan(run_config, asked, faults))


def _doctor(config: str | None, zone: str | None, json: bool | None, **given: Any) -> int:
    """Look for what would stand in a run's way on this machine, each with its fix; exit code 3 if there is any."""
    launch.prepare_environment("native")
    faults: list[str] = []
    run_config = resolve_config(config, given, faults)
    if faults:
        raise ConfigError(faults)
    from numina_finetune.doctor.command import run_doctor

    return int(run_doctor(run_config, zone=zone, as_json=bool(json)))


def _evaluate(**given: Any) -> int:
    """Measure how often a model's answers are right; the same command again goes on where it was cut."""
    options = EvaluateOptions.from_mapping(given)
    devices = RunConfig(backend=options.backend)
    name, _ = launch.choose_backend(devices if options.backend in BACKENDS else RunConfig())
    launch.prepare_environment(name)
    if faults := [*launch.faults(name), *options.faults()]:
        raise ConfigError(faults)

    from numina_finetune.checkpoint.preemption import StopNotice
    from numina_finetune.evaluate_command import run_evaluate

    with StopNotice() as notice:
        code = run_evaluate(options, _backend_factory(name), lambda: notice.wanted)
        return int(ExitCode.STOPPED if code == ExitCode.PREEMPTED and notice.signal == signal.SIGINT else code)


def _data_config(yaml_path: str | None, given: dict[str, Any]) -> RunConfig:
    """What the ``data`` commands were asked for; no device library is loaded for them."""
    launch.prepare_environment("native")
    faults: list[str] = []
    config = resolve_config(yaml_path, given, faults)
    if faults:
        raise ConfigError(faults)
    return config


def _backend_factory(name: str) -> Callable[[RunConfig], Any]:
    """The one place that knows every backend; each imports its device library only when chosen."""
    if name == "xla":
        from numina_finetune.xla.backend import XlaBackend

        return XlaBackend
    from numina_finetune.torch_native.backend import NativeBackend

    return NativeBackend


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"numina-finetune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before any command."""


@app.command()
def quickstart(
    output_dir: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("quickstart-run"),
) -> int:
    """Train a tiny model on generated problems, be preempted, resume, evaluate, export: a few minutes on a CPU."""
    launch.prepare_environment("native")
    from numina_finetune.quickstart import run_quickstart

    return run_quickstart(output_dir, _backend_factory("native"))


@app.command()
def export(
    run: _Run,
    output: Annotated[str, typer.Option(help="Empty folder or gs://bucket/prefix for the model.")],
    step: Annotated[str, typer.Option(help="Step of the checkpoint, or newest.")] = "newest",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; what the run computes with if unset.")] = None,
    lora_export: Annotated[
        str | None, typer.Option(help="Of a LoRA run: merged (a plain model; the default) or adapter (PEFT's files).")
    ] = None,
) -> int:
    """Make a plain Hugging Face folder from any checkpoint of a run, on a CPU."""
    launch.prepare_environment("native")
    from numina_finetune.export_command import run_export

    return int(run_export(run, step, output, dtype, lora_export))


@app.command()
def report(
    run: _Run,
    output: Annotated[str | None, typer.Option(help="The page; report.html in the run's folder if unset.")] = None,
) -> int:
    """Write one HTML page on a run: curves over all its lives, speed, checkpoints, data, evaluations, outcomes."""
    launch.prepare_environment("native")
    from numina_finetune.run_report.command import run_report

    return int(run_report(run, output))


@app.command(context_settings={**_CONTEXT, "ignore_unknown_options": True, "allow_extra_args": True})
def sweep(
    ctx: typer.Context,
    lrs: Annotated[str, typer.Option(help="Learning rates: 1e-5,3e-5, or LOW:HIGH:COUNT, evenly spaced in log.")],
    parallel: Annotated[
        int, typer.Option(help="Trials at a time; how they share cores or GPUs is for you to arrange.")
    ] = 1,
    diverge_factor: Annotated[
        float, typer.Option(help="Stop a trial whose loss stays above so many times its best; 0 = never.")
    ] = 2.0,
    diverge_steps: Annotated[int, typer.Option(help="For so many steps in a row.")] = 20,
) -> int:
    """Train at several learning rates and rank them; every other option goes to train. Given again, it goes on."""
    from numina_finetune.sweep.command import SweepOptions, passed_faults, run_sweep
    from numina_finetune.sweep.divergence import Criteria

    words, faults = list(ctx.args), list[str]()
    given = _training_options(words)
    faults += passed_faults(given)
    try:
        base = resolve_config(given.pop("config"), given, faults)
    except ConfigError as error:
        raise ConfigError(dict.fromkeys([*faults, *error.problems])) from error
    options = SweepOptions(lrs, parallel, Criteria(diverge_factor, diverge_steps))
    return int(run_sweep(options, base, words, faults))


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="Folder or gs://… of an evaluation.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="Of another one, on the same problems.")],
    output_dir: Annotated[
        str | None, typer.Option(help="Folder or gs://bucket/prefix for the problems that changed, as a page.")
    ] = None,
) -> int:
    """Compare two evaluations problem by problem: which model is better, and how sure that is."""
    launch.prepare_environment("native")
    from numina_finetune.evaluate_command import run_compare

    return int(run_compare(first, second, output_dir))


@app.command()
def stage(
    model_name: Annotated[str, typer.Option(help="Hub name or local folder.")],
    output_dir: Annotated[str, typer.Option(help="gs://bucket/prefix or folder that holds staged models.")],
    model_revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")] = None,
) -> int:
    """Put a model's weights, configuration and tokenizer into a bucket once, so that no machine asks the hub again."""
    launch.prepare_environment("native")
    from numina_finetune.models.stage import run_stage

    return int(run_stage(model_name, model_revision, output_dir))


_PREVIEW_OPTIONS = (
    parameter("rows", int, "Rows of each dataset. [default: 3]", "Output"),
    parameter("color", bool, "Colour the targets; by default where the output is a terminal.", "Output"),
    parameter("ids", bool, "Print the token ids too.", "Output"),
)
_BF16 = parameter("bf16", bool, "--bf16 is --precision bf16, --no-bf16 is --precision fp32.", "Model")
_CHECKPOINTING = parameter(
    "gradient_checkpointing",
    bool,
    "--gradient-checkpointing is --remat full, --no-gradient-checkpointing is --remat none.",
    "Optimisation",
)
_FIELDS = [f for f in fields(RunConfig) if f.name != "datasets"]
_DATA_FIELDS = [
    f
    for f in _FIELDS
    if f.metadata["group"] == "Data" or f.name in ("model_name", "model_revision", "tokenizer_name", "seed")
]

app.command(DEFAULT_COMMAND)(command_of(_train, _train.__doc__, _FIELDS, _BF16, _CHECKPOINTING))

_PLAN_OPTIONS = (
    parameter("tpu", str, "Type of the slice, such as v5litepod-8, v6e-16, v5p-128, v4-8.", "Plan"),
    parameter("json", bool, "Print it for machines.", "Plan"),
    parameter("max_compilations", int, "Compilations for the advice; 1 = none of it. [default: 8]", "Plan"),
    parameter("prices", str, "YAML with `date` and `prices`: family -> region -> dollars a chip and hour.", "Plan"),
    parameter("region", str, "Where it would run; the cheapest one if unset.", "Plan"),
)
app.command("plan")(command_of(_plan, _plan.__doc__, _FIELDS, _BF16, *_PLAN_OPTIONS))

_DOCTOR_OPTIONS = (
    parameter("zone", str, "Zone of the machines that will train, such as us-east5-b; this one's if unset.", "Doctor"),
    parameter("json", bool, "Print it for machines.", "Doctor"),
)
app.command("doctor")(command_of(_doctor, _doctor.__doc__, _FIELDS, _BF16, _CHECKPOINTING, *_DOCTOR_OPTIONS))

app.command("evaluate")(
    with_parameters(_evaluate, _evaluate.__doc__, [field_parameter(f) for f in fields(EvaluateOptions)])
)

data_app = typer.Typer(help="Prepare and look at data, without a model or a device.", context_settings=_CONTEXT)
app.add_typer(data_app, name="data")
for _name, _run, *_more in (
    ("prepare", _prepare),
    ("check", _check),
    ("preview", _preview, *_PREVIEW_OPTIONS),
    ("report", _report, parameter("report_dir", str, "Folder of the report.", "Output")),
):
    data_app.command(_name)(command_of(_run, _run.__doc__, _DATA_FIELDS, *_more))

checkpoints_app = typer.Typer(
    help="Look at a run's checkpoints, check them, delete old ones.", context_settings=_CONTEXT
)
app.add_typer(checkpoints_app, name="checkpoints")


@checkpoints_app.command("list")
def checkpoints_list(
    run: _Run, json: Annotated[bool, typer.Option("--json", help="Print it for machines.")] = False
) -> int:
    """Print steps, sizes, ages, and what is committed; of each run, where RUN holds several."""
    launch.prepare_environment("native")
    from numina_finetune.checkpoint_commands import run_list

    return int(run_list(run, as_json=json))


@checkpoints_app.command("verify")
def checkpoints_verify(
    run: _Run, step: Annotated[int | None, typer.Option(help="Only this step's; all if unset.")] = None
) -> int:
    """Read every byte of the committed checkpoints again; exit code 3 if one is not what was committed."""
    launch.prepare_environment("native")
    from numina_finetune.checkpoint_commands import run_verify

    return int(run_verify(run, step))


@checkpoints_app.command("prune")
def checkpoints_prune(
    run: _Run,
    keep: Annotated[int, typer.Option(help="Sound checkpoints that stay, the newest ones; the best besides.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what would go.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if the run seems to be under way.")] = False,
) -> int:
    """Delete old checkpoints and what was never committed."""
    launch.prepare_environment("native")
    from numina_finetune.checkpoint_commands import run_prune

    return int(run_prune(run, keep, yes=yes, force=force))


spot_app = typer.Typer(help="Keep a training on spot TPUs alive until it is done.", context_settings=_CONTEXT)
app.add_typer(spot_app, name="spot")
_TRAINING = inspect.Parameter(
    "training",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        list[str] | None,
        typer.Argument(metavar="-- TRAINING OPTIONS", help="As for train, without --output-dir and --run-id."),
    ],
)
spot_app.command("run")(
    with_parameters(_spot_run, _spot_run.__doc__, [_TRAINING, *(field_parameter(f) for f in fields(SpotOptions))])
)


@spot_app.command("status")
def spot_status(run: _Run) -> int:
    """Print state, machine, step, loss, cost so far, goodput, what comes next, and who supervises."""
    from numina_finetune.spot import commands

    return int(commands.status(run))


@spot_app.command("logs")
def spot_logs(
    run: _Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
) -> int:
    """Print every worker's log, set-ups and trainings in the order of their lives."""
    from numina_finetune.spot import commands

    return int(commands.logs(run, follow=follow))


@spot_app.command("stop")
def spot_stop(run: _Run) -> int:
    """Have the training save, then delete the machine; with and without a living supervisor."""
    from numina_finetune.spot import commands

    return int(commands.stop(run))


@spot_app.command("clean")
def spot_clean(run: _Run) -> int:
    """Delete every machine of the run, whatever state it is in."""
    from numina_finetune.spot import commands

    return int(commands.clean(run))


@spot_app.command("report")
def spot_report(run: _Run) -> int:
    """Print where the machine time went and what a million tokens cost; draw it too."""
    from numina_finetune.spot import commands

    return int(commands.report(run))
