"""The recipes, and the command with nothing but its defaults, cut to what a test can run.

Sizes, lengths and places are replaced. Rates, schedule, warm-up, precision, recomputation, scan, optimizer, adapters
and mesh stay what users run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from numina_finetune.models.builtin import TINY_TOKENIZER, tiny_config
from numina_finetune.option_fields import flag
from numina_finetune.plan.geometry import GEOMETRIES
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
STEPS = 30
DEVICES = 4
CHIPS = 16
"""Of the largest slice that a dense recipe is planned for: more rows a step than these take at once accumulate."""
HELD_OUT = 8
LENGTH = 128
SMALL: Mapping[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
}
"""Of the models, whose other figures are those of the built-in ones."""
REPLACED = frozenset(
    {
        *("model_name", "datasets", "eval_dataset_name", "validation_size", "max_seq_length"),
        *("per_device_train_batch_size", "global_batch_size", "num_train_epochs", "max_steps", "eval_steps"),
    }
)
"""All that a recipe's run may have otherwise here, besides a mesh that takes more than four devices."""


@dataclass(frozen=True)
class Setting:
    """What one or several recipes are, but for sizes."""

    name: str
    kept: Mapping[str, Any]
    """The options that stay, and the kind of ``model`` and the ``sources`` that take the places of the recipe's own."""

    def words(self, folder: Path, devices: int) -> list[str]:
        """The command on so many devices, but for its place; ``folder`` holds what it reads."""
        own = dict(self.kept)
        kind, sources = own.pop("model"), own.pop("sources")
        evaluates, accumulates = own.pop("evaluates"), own.pop("accumulates")
        count = 2 * DEVICES * (2 if accumulates else 1) + (HELD_OUT if evaluates == "validation_size" else 0)
        own |= {
            "model_name": model(folder, kind),
            "datasets": [{**source, "name": rows(folder, source["format"], count)} for source in sources],
            "max_seq_length": LENGTH,
            "max_steps": STEPS,
            "per_device_train_batch_size": DEVICES // devices,  # the same micro-batches on any number of devices
        }
        if evaluates == "validation_size":
            own["validation_size"] = HELD_OUT
        elif evaluates:
            own["eval_dataset_name"] = "synthetic-gsm8k"
        if evaluates:
            own["eval_steps"] = STEPS // 2
        if accumulates:
            own["global_batch_size"] = 2 * DEVICES
        if devices == 1 and "expert" in own.get("mesh", ""):
            del own["mesh"]
        path = folder / f"{self.name}, {devices}.yaml"
        path.write_text(yaml.safe_dump(own), encoding="utf-8")
        return ["--config", str(path)]


class Bare(Setting):
    """A command that says no more than a model, a dataset, a place, and perhaps that there are to be adapters."""

    def words(self, folder: Path, devices: int) -> list[str]:
        given = {**self.kept, "model_name": model(folder, self.kept["model"])}
        given["dataset_name"] = rows(folder, "gsm8k", 2 * DEVICES)
        del given["model"]
        given |= {"max_steps": STEPS, "max_seq_length": LENGTH}
        given["per_device_train_batch_size"] = DEVICES // devices
        return [word for name, value in given.items() for word in (flag(name), str(value))]


BARE = (
    Bare("bare", {"model": "tied"}),
    Bare("bare, untied", {"model": "untied"}),
    Bare("bare, gpt-oss", {"model": "gpt-oss"}),
    Bare("bare, LoRA", {"model": "tied", "lora_rank": 4}),
    Bare("bare, untied, LoRA", {"model": "untied", "lora_rank": 4}),
)


def settings() -> list[Setting]:
    """The bare commands, and every recipe once, those as one that differ in sizes alone."""
    found: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for path in RECIPES:
        kept = without_sizes(yaml.safe_load(path.read_text(encoding="utf-8")))
        found.setdefault(json.dumps(kept, sort_keys=True), ([], kept))[0].append(path.stem)
    return [*BARE, *(Setting("+".join(names), kept) for names, kept in found.values())]


def without_sizes(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What stays of a recipe, and in place of what does not, what kind it was of."""
    geometry = GEOMETRIES[recipe["model_name"]]
    kept = {name: value for name, value in recipe.items() if name not in REPLACED}
    dense = "tied" if geometry.get("tie_word_embeddings") else "untied"
    kept["model"] = "gpt-oss" if geometry["model_type"] == "gpt_oss" else dense
    kept["sources"] = [
        {key: value for key, value in source.items() if key not in ("name", "config")} for source in recipe["datasets"]
    ]
    kept["evaluates"] = next((name for name in ("eval_dataset_name", "validation_size") if name in recipe), None)
    kept["accumulates"] = recipe.get("global_batch_size", 0) > CHIPS * recipe["per_device_train_batch_size"]
    if "expert=8" in recipe.get("mesh", ""):
        kept["mesh"] = "fsdp=2,expert=2"
    return kept


def model(folder: Path, kind: str) -> str:
    """``--model-name`` of a random model of the kind, in ``folder``."""
    place = folder / kind
    if not place.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))
        config = tiny_config("tiny-gpt-oss" if kind == "gpt-oss" else "tiny-qwen3", tokenizer)
        config.update({**SMALL, "tie_word_embeddings": kind == "tied"})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
    return str(place)


def rows(folder: Path, form: str, count: int) -> str:
    """A file of rows of this format, two of which fill one of the batch: all make one step, so that each sees the same.

    Else the loss of few steps at the recipes' rates would say more of their rows than of what was learned.
    """
    path = folder / f"{form}-{count}.jsonl"
    problems = [(f"What is {n} plus {n + 7} plus {n + 9}?", 3 * n + 16) for n in range(11, 11 + count)]
    path.write_text("".join(json.dumps(ROWS[form](*problem)) + "\n" for problem in problems), encoding="utf-8")
    return str(path)


def _gsm8k(problem: str, result: int) -> dict[str, Any]:
    return {"question": problem, "answer": f"It is {result}.\n#### {result}"}


def _numina_cot(problem: str, result: int) -> dict[str, Any]:
    return {"source": "generated", **_numina_tir(problem, result)}


def _numina_tir(problem: str, result: int) -> dict[str, Any]:
    """Without code, as some of its rows are: the definition of a tool alone is 700 of the tiny tokenizer's tokens."""
    solution = f"It is \\boxed{{{result}}}."
    turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"problem": problem, "solution": solution, "messages": turns}


ROWS = {"gsm8k": _gsm8k, "numina_cot": _numina_cot, "numina_tir": _numina_tir}
"""By the format: a row of it that asks and solves a problem."""
