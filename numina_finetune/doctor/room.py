"""Whether the model has room: in memory, in the hub's cache, where checkpoints go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM

from numina_finetune.config import RunConfig
from numina_finetune.doctor.devices import GB, Machine, available_memory, tpu_chips
from numina_finetune.doctor.findings import Finding, fault, note, ok
from numina_finetune.errors import ConfigError
from numina_finetune.models.hub import is_staged
from numina_finetune.plan.geometry import geometry_of

WEIGHT_BYTES = 4
"""Of a trained parameter, in fp32, and of its gradient."""
OPTIMIZER_BYTES = {"adamw": 8, "adafactor": 0}
"""Of a trained parameter: AdamW's two moments; Adafactor's rows and columns are less than a hundredth of it."""
STORED_BYTES = 2
"""Of a parameter in bf16, as models are published."""


def check_room(config: RunConfig, machine: Machine = Machine()) -> Iterator[Finding]:  # noqa: B008
    """Compare what the model takes with what there is; activations come on top, and ``plan`` knows them."""
    try:
        parameters = parameters_of(config)
    except (ConfigError, OSError, ValueError) as error:
        yield note("model", f"its size is not known: {error}", "see the findings about the hub")
        return
    yield ok("model", f"{config.model_name} has {parameters / 1e9:.2f}B parameters")
    trained = 0 if config.lora_rank else parameters
    yield from _memory(config, parameters, trained, machine)
    if not Path(config.model_name).is_dir() and not is_staged(config.model_name) and parameters > 1e8:
        yield from _disk(
            "hub cache", Path(constants.HF_HUB_CACHE), parameters * STORED_BYTES, "HF_HOME on a larger disk"
        )
    if config.output_dir and not config.output_dir.startswith("gs://"):
        checkpoints = (
            trained * (WEIGHT_BYTES + OPTIMIZER_BYTES[config.optim]) * (config.save_total_limit + 1)
            + parameters * STORED_BYTES
        )
        remedy = "another --output-dir, a smaller --save-total-limit, or gs://"
        yield from _disk("checkpoints", Path(config.output_dir).expanduser(), checkpoints, remedy)


def parameters_of(config: RunConfig) -> int:
    """How many parameters the model has, tied ones once.

    Raises:
        ConfigError, OSError, ValueError: its configuration cannot be had.
    """
    values = dict(geometry_of(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    return sum(parameter.numel() for parameter in model.parameters())


def _memory(config: RunConfig, parameters: int, trained: int, machine: Machine) -> Iterator[Finding]:
    needed = trained * (2 * WEIGHT_BYTES + OPTIMIZER_BYTES[config.optim]) + (parameters - trained) * STORED_BYTES
    told = f"weights, gradients and optimizer take {needed / GB:.1f} GB"
    if tpu_chips(machine):
        yield note("memory", f"{told}, split over all chips", "numina-finetune plan --tpu TYPE says whether it fits")
        return
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    free = min((torch.cuda.mem_get_info(number)[0] for number in range(gpus)), default=available_memory())
    where = "a GPU" if gpus else "this machine"
    if needed > free:
        remedy = (
            "--lora-rank 16, --optim adafactor, --precision pure-bf16, a smaller model, or a TPU (numina-finetune plan)"
        )
        yield fault("memory", f"{told}; {where} has {free / GB:.1f} GB free", remedy)
    else:
        yield ok("memory", f"{told} of {free / GB:.1f} GB free on {where}, activations come on top")


def _disk(subject: str, folder: Path, needed: int, remedy: str) -> Iterator[Finding]:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    told = f"{needed / GB:.1f} GB of {free / GB:.1f} GB free at {existing}"
    yield ok(subject, told) if needed <= free else fault(subject, told, remedy)
