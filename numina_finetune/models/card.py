"""The model card of an exported model: what it was trained on, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from numina_finetune.config import RunConfig


def model_card(
    config: RunConfig, *, run_id: str, steps: int, tokens: int, data: Mapping[str, Any], adapter: bool = False
) -> str:
    """Markdown with the hub's front matter.

    Args:
        steps: optimizer steps made.
        tokens: real tokens trained on.
        data: the data report of :mod:`numina_finetune.data.dataset`.
        adapter: the card is that of the adapters alone.
    """
    hub_names = [
        source.name for source in config.datasets if "/" in source.name and not source.name.startswith((".", "/"))
    ]
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["math", "sft"],
    }
    if "/" in config.model_name and not config.model_name.startswith((".", "/")):
        front["base_model"] = config.model_name
    if hub_names:
        front["datasets"] = hub_names
    settings = {
        "run": run_id,
        "base model": config.model_name,
        "optimizer steps": steps,
        "tokens": tokens,
        "sequence length": config.max_seq_length,
        "packing": config.packing,
        "precision": config.precision,
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler_type}",
        "seed": config.seed,
    }
    if config.lora_rank:
        settings["adapters"] = f"LoRA, rank {config.lora_rank}, scale {config.lora_scale:g}, {config.lora_targets}"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {run_id}",
        "",
        "Fine-tuned with numina_finetune; the loss was taken on the assistant's turns only.",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
        "## Data",
        "",
        "| source | rows read | kept | dropped | tokens | with loss |",
        "|---|---|---|---|---|---|",
        *(_source_row(source) for source in data["sources"]),
        "",
    ]
    return "\n".join(lines)


def _source_row(source: Mapping[str, Any]) -> str:
    dropped = "; ".join(f"{entry['count']}: {reason}" for reason, entry in source["dropped"].items()) or "0"
    columns = (source["name"], source["rows"], source["kept"], dropped, source["tokens"], source["supervised_tokens"])
    return "| " + " | ".join(str(column) for column in columns) + " |"
