"""What a model is trained with where the command line says nothing else: the recipes' choices, found by ``plan``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from numina_finetune.config import ALIASES
from numina_finetune.option_fields import flag

logger = logging.getLogger(__name__)

_GPT_OSS = {
    "max_seq_length": 4096,
    "per_device_train_batch_size": 1,
    "remat": "full",
    "learning_rate": 1e-5,
    "warmup_ratio": 0.03,
    "precision": "bf16",
}
MODEL_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "openai/gpt-oss-20b": _GPT_OSS,
    "openai/gpt-oss-120b": _GPT_OSS,
}
"""By the hub's name; the same as in ``configs/recipes/numina_tir_gpt_oss_*.yaml``."""
EXPERT_GROUPS: Mapping[str, int] = {"openai/gpt-oss-20b": 4, "openai/gpt-oss-120b": 8}
"""Devices among which these models' experts are divided, where the devices come in such numbers."""


def default_mesh(model_name: str, devices: int) -> str | None:
    """What ``--mesh`` is where it is not given; None = all devices along one axis."""
    group = EXPERT_GROUPS.get(ALIASES.get(model_name, model_name), 1)
    return f"fsdp=-1,expert={group}" if group > 1 and devices % group == 0 else None


def with_model_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` options, and the model's own for those that are not; one notice names what differs from usual."""
    name = given.get("model_name")
    known = MODEL_DEFAULTS.get(ALIASES.get(str(name), str(name)), {})
    taken = {option: value for option, value in known.items() if option not in given}
    if taken:
        logger.info(
            "%s: %s, as for this model in general; any of them can be given",
            name,
            " ".join(f"{flag(option)} {value}" for option, value in taken.items()),
        )
    return {**given, **taken}
