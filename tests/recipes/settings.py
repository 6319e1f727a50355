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

from numina_finetune.data.synthetic import generate_problems
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
GENERATED = "synthetic-gsm8k"
FEW = f"{GENERATED}[test]"
"""Which take a sixtieth of the time to make."""
LENGTH = 128
"""Tokens in a row: as few as what :func:`rows` writes allows."""
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
        own |= {
            "model_name": model(folder, kind),
            "datasets": [{**source, "name": rows(folder, source["format"])} for source in sources],
            "max_seq_length": LENGTH,
            "max_steps": STEPS,
            "per_device_train_batch_size": DEVICES // devices,  # the same micro-batches on any number of devices
        }
        if evaluates == "validation_size":
            own["validation_size"] = HELD_OUT
        elif evaluates:
            own["eval_dataset_name"] = GENERATED
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
        given = {**self.kept, "model_name": model(folder, self.kept["model"]), "dataset_name": FEW}
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
    """What ``--model-name`` is for a tiny model of the kind; one that is not built in is in ``folder``."""
    if kind != "untied":
        return {"tied": "tiny-qwen3", "gpt-oss": "tiny-gpt-oss"}[kind]
    place = folder / "untied"
    if not place.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))
        config = tiny_config("tiny-qwen3", tokenizer)
        config.tie_word_embeddings = False
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
    return str(place)


def rows(folder: Path, form: str) -> str:
    """Generated problems as a dataset of this format has them."""
    if form == "gsm8k":
        return GENERATED
    path = folder / f"{form}.jsonl"
    if not path.is_file():
        written = (ROWS[form](**problem) for problem in generate_problems("train", count=2000))
        path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return str(path)


def _numina_cot(question: str, answer: str) -> dict[str, Any]:
    steps, _, result = answer.rpartition("\n#### ")
    return {"source": "generated", **_solved(question, f"{steps}\n\\boxed{{{result}}}")}


def _numina_tir(question: str, answer: str) -> dict[str, Any]:
    """Without code, as some of its rows are: the definition of a tool alone is 700 of the tiny tokenizer's tokens."""
    return _solved(question, f"It is \\boxed{{{answer.rpartition('#### ')[2]}}}.")


def _solved(problem: str, solution: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"problem": problem, "solution": solution, "messages": turns}


ROWS = {"numina_cot": _numina_cot, "numina_tir": _numina_tir}
"""By the format: a row of it out of a generated problem."""
