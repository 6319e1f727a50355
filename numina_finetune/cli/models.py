"""What becomes of a model's files: ``export`` and ``stage``."""

from __future__ import annotations

from typing import Annotated

import typer

from numina_finetune import launch
from numina_finetune.cli.groups import RunArgument, group

app = group()


@app.command()
def export(
    run: RunArgument,
    output: Annotated[str, typer.Option(help="Empty folder or gs://bucket/prefix for the model.")],
    step: Annotated[str, typer.Option(help="Step of the checkpoint, or newest.")] = "newest",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; what the run computes with if unset.")] = None,
    lora_export: Annotated[
        str | None, typer.Option(help="Of a LoRA run: merged (a plain model; the default) or adapter (PEFT's files).")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings with it.")
    ] = False,
    push_to_hub: Annotated[bool, typer.Option("--push-to-hub", help="Upload it to the Hugging Face hub too.")] = False,
    hub_model_id: Annotated[
        str | None, typer.Option(help="--push-to-hub: name or user/name; the run's name if unset.")
    ] = None,
    hub_private: Annotated[
        bool, typer.Option("--hub-private", help="--push-to-hub: make a new repository a private one.")
    ] = False,
) -> int:
    """Make a plain Hugging Face folder from any checkpoint of a run, on a CPU."""
    launch.prepare_environment("native")
    from numina_finetune.export_command import run_export
    from numina_finetune.models.push import PushOptions

    hub = PushOptions(push_to_hub, hub_model_id, hub_private)
    return int(run_export(run, step, output, dtype, lora_export, trust_remote_code=trust_remote_code, hub=hub))


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
