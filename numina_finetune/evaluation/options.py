"""The options of what asks a model (``evaluate``, ``generate``), and what can be seen at once to be wrong with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from numina_finetune.checks import bound_faults, choice_faults, is_date
from numina_finetune.config import BACKENDS, CHAT_FAMILIES, EXPERTS, PRECISIONS, REASONING_EFFORTS, TIR_STYLES
from numina_finetune.option_fields import flag

PROMPTS = ("chat", "completion")
STYLES = ("gsm8k", "gsm8k-flexible", "boxed")
TOOLS = ("python",)
MINIMUMS = ("isolated", "filtered", "none")
"""See :class:`numina_finetune.evaluation.sandbox.Minimum`."""
_DECODED_TOGETHER = 32


def option(default: Any, help: str, group: str) -> Any:
    """A field that is also a command-line option, which help shows under ``group``."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(frozen=True)
class AnswerOptions:
    """Which model is asked, and how it answers: what ``evaluate`` and ``generate`` have in common."""

    model: str = option(
        "", "A model's folder, hub name or built-in name, or a run's folder or gs://bucket/prefix/run-id.", "Model"
    )
    model_revision: str | None = option(None, "Branch, tag or commit of the model.", "Model")
    tokenizer_name: str | None = option(None, "Hub name or folder of the tokenizer; the model's own if unset.", "Model")
    trust_remote_code: bool = option(False, "Run Python code that a model or tokenizer brings with it.", "Model")
    checkpoint: str = option("newest", "Of a run: newest, best (by its evaluations) or a step's number.", "Model")
    precision: str | None = option(
        None, "pure-bf16, fp32, or bf16 (bf16 compute on fp32 weights); what the weights are if unset.", "Model"
    )
    system_prompt: str | None = option(None, "System message of the chat.", "Prompt")
    chat_family: str = option("auto", "Chat layout: auto, qwen3, harmony (gpt-oss) or template.", "Prompt")
    chat_date: str = option("2025-06-28", "Today's date, as system messages give it: YYYY-MM-DD.", "Prompt")
    reasoning_effort: str = option("medium", "What gpt-oss's system message asks for: low, medium or high.", "Prompt")
    max_new_tokens: int = option(1024, "Tokens after which an answer is cut.", "Decoding")
    temperature: float = option(0.0, "Of sampling; 0 = the most likely token.", "Decoding")
    top_p: float = option(1.0, "Sample among the likeliest tokens with this share of the probability.", "Decoding")
    top_k: int = option(0, "Sample among so many of the likeliest tokens; 0 = all.", "Decoding")
    samples: int = option(1, "Attempts at each problem or prompt.", "Decoding")
    seed: int = option(0, "Of sampling.", "Decoding")
    batch_size: int = option(_DECODED_TOGETHER, "Attempts that are decoded together, over all devices.", "Decoding")
    tools: str | None = option(None, "Tools that the model may call: python.", "Tools")
    tir_style: str = option("tool_calls", "How it calls python: tool_calls, or text (code blocks).", "Tools")
    max_rounds: int = option(8, "Calls in one attempt.", "Tools")
    tool_seconds: float = option(10.0, "Of one call, by the clock.", "Tools")
    tool_memory_mb: int = option(1024, "Of one attempt's interpreter.", "Tools")
    tool_output_chars: int = option(200, "Of a result that the model is shown.", "Tools")
    sandbox_minimum: str = option(
        "isolated",
        f"Protections without which no code is run: {', '.join(MINIMUMS)} (limits of resources alone).",
        "Tools",
    )
    backend: str = option("auto", "auto, xla (TPU through SPMD) or native (CPU and GPUs).", "Devices")
    mesh: str | None = option(None, 'Devices along each axis, such as "fsdp=4,tensor=2".', "Devices")
    experts: str = option("auto", f"Of models with experts: {', '.join(EXPERTS)}.", "Devices")
    scan_layers: bool = option(True, "XLA: compile one layer, and run it in a loop over all of them.", "Devices")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Self:
        """Of the command line's values, where what was not given is None."""
        told: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        told |= {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
        return cls(**told)

    def settings(self) -> dict[str, Any]:
        """What decides the answers, so that it must not change between two lives that make them.

        Devices do not, and what is decoded together does not.
        """
        free = {f.name for f in fields(self) if f.metadata["group"] in ("Devices", "Output")} | {
            "batch_size",
            "trust_remote_code",
        }
        if self.tools is None:
            free |= {f.name for f in fields(self) if f.metadata["group"] == "Tools"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}

    def faults(self) -> list[str]:
        """Everything that is wrong with the options themselves."""
        return [*self._missing(), *self._not_among(), *self._out_of_range(), *self._contradictions()]

    def _missing(self) -> list[str]:
        return [] if self.model else ["--model is missing: give a model's folder or hub name, or a run's folder"]

    def _not_among(self) -> list[str]:
        allowed: dict[str, tuple[str | None, ...]] = {
            "precision": (*PRECISIONS, None),
            "chat_family": CHAT_FAMILIES,
            "reasoning_effort": REASONING_EFFORTS,
            "tools": (*TOOLS, None),
            "tir_style": TIR_STYLES,
            "sandbox_minimum": MINIMUMS,
            "backend": BACKENDS,
            "experts": EXPERTS,
        }
        faults = choice_faults(self, allowed)
        if self.checkpoint not in ("newest", "best") and not self.checkpoint.isdecimal():
            faults.append(f"--checkpoint {self.checkpoint!r} is unknown: use newest, best or a step's number")
        if not is_date(self.chat_date):
            faults.append(f"--chat-date {self.chat_date!r} is no date: write it as 2025-06-28")
        return faults

    def _out_of_range(self) -> list[str]:
        at_least = {
            "max_new_tokens": 1,
            "top_k": 0,
            "samples": 1,
            "seed": 0,
            "batch_size": 1,
            "temperature": 0,
            "max_rounds": 1,
            "tool_memory_mb": 1,
            "tool_output_chars": 1,
        }
        faults = bound_faults(self, at_least)
        if not 0 < self.tool_seconds < math.inf:
            faults.append(f"--tool-seconds {self.tool_seconds} is out of range: use more than 0")
        if not 0 < self.top_p <= 1:
            faults.append(f"--top-p {self.top_p} is out of range: use more than 0, up to 1")
        return faults

    def _contradictions(self) -> list[str]:
        faults = []
        if self.temperature == 0:
            if self.samples > 1:
                faults.append(f"--samples {self.samples} would all be the same: add --temperature, such as 0.7")
            faults += [
                f"{flag(name)} {getattr(self, name)} is of sampling: add --temperature, such as 0.7, or leave it out"
                for name, unset in (("top_p", 1.0), ("top_k", 0))
                if getattr(self, name) != unset
            ]
        if self.tools is None:
            faults += [
                f"{flag(f.name)} {getattr(self, f.name)} is about calls of tools: add --tools python"
                for f in fields(self)
                if f.metadata["group"] == "Tools" and getattr(self, f.name) != f.default
            ]
        return faults


@dataclass(frozen=True)
class EvaluateOptions(AnswerOptions):
    """What ``evaluate`` was asked for."""

    task: str = option(
        "",
        "gsm8k, math500, synthetic-gsm8k, or a dataset of questions and answers: a file, name or name[split].",
        "Task",
    )
    question_field: str | None = option(None, "Column of the question; question or problem if unset.", "Task")
    answer_field: str | None = option(None, "Column of the answer; answer or solution if unset.", "Task")
    answer_style: str | None = option(
        None, f"How answers are read: {', '.join(STYLES)}; the task's own if unset.", "Task"
    )
    max_problems: int | None = option(None, "At most so many problems, chosen by the seed.", "Task")
    shots: int = option(0, "Solved examples before each question, from the training split, chosen by the seed.", "Task")
    shots_file: str | None = option(None, "Dataset of questions and answers that the examples come from.", "Task")
    prompt: str = option(
        "chat", 'chat (as trained; examples are earlier turns) or completion ("Question: …\\nAnswer:").', "Prompt"
    )
    instruction: str | None = option(
        None,
        "Text behind every question (completion: at the very beginning), such as how to mark the answer.",
        "Prompt",
    )
    seed: int = option(0, "Of sampling, of the examples, and of --max-problems.", "Decoding")
    output_dir: str = option(
        "", "Folder or gs://bucket/prefix of the results; an evaluation that was cut goes on there.", "Output"
    )

    def _missing(self) -> list[str]:
        needed = {
            "task": "give gsm8k, math500, synthetic-gsm8k or a dataset",
            "output_dir": "give the folder for the results",
        }
        faults = [f"{flag(name)} is missing: {fix}" for name, fix in needed.items() if not getattr(self, name)]
        return [*super()._missing(), *faults]

    def _not_among(self) -> list[str]:
        return [*super()._not_among(), *choice_faults(self, {"answer_style": (*STYLES, None), "prompt": PROMPTS})]

    def _out_of_range(self) -> list[str]:
        faults = [*super()._out_of_range(), *bound_faults(self, {"shots": 0})]
        if self.max_problems is not None and self.max_problems < 1:
            faults.append(f"--max-problems {self.max_problems} is too small: use 1 or more")
        return faults

    def _contradictions(self) -> list[str]:
        faults = super()._contradictions()
        if self.shots_file and not self.shots:
            faults.append(f"--shots-file {self.shots_file} is not read: say how many examples with --shots")
        if self.prompt == "completion":
            faults += [
                f"{flag(name)} has no place in --prompt completion: leave it out, or use --prompt chat"
                for name in ("system_prompt", "tools")
                if getattr(self, name)
            ]
        return faults


@dataclass(frozen=True)
class GenerateOptions(AnswerOptions):
    """What ``generate`` was asked for."""

    prompt: tuple[str, ...] = option((), "What the model is asked; may be repeated.", "Prompt")
    prompts: str | None = option(
        None,
        "File of prompts: .txt (one a line), .jsonl (prompt or messages), or - for lines of standard input.",
        "Prompt",
    )
    raw: bool = option(False, "The model goes on with the text as it is, without a chat layout.", "Prompt")
    output: str | None = option(
        None, "File for the answers, .jsonl, a line a prompt; what was cut goes on there. Printed if unset.", "Output"
    )

    def _contradictions(self) -> list[str]:
        faults = super()._contradictions()
        if self.prompt and self.prompts:
            faults.append(f"--prompt and --prompts {self.prompts} both say what is asked: keep one")
        if self.raw:
            faults += [
                f"{flag(name)} has no place in --raw, which has no chat: leave one of them out"
                for name in ("system_prompt", "tools")
                if getattr(self, name)
            ]
        if self.output and self.output.startswith("gs://"):
            faults.append(f"--output {self.output}: answers are written into a file here: copy it when it is whole")
        return faults
