"""Rows -> samples, a chunk at a time: format, validate, check for contamination, render, fit the length."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numina_finetune.config import RunConfig, SourceConfig
from numina_finetune.data.chat import ChatOptions, Chunk, renderer
from numina_finetune.data.contamination import Contamination, question_of
from numina_finetune.data.conversation import Conversation
from numina_finetune.data.formats import format_example
from numina_finetune.data.tool_calls import validate_conversation
from numina_finetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLES_KEPT = 3
"""Rows of each reason that the report shows."""

REASONS_KEPT = 200
"""Reasons told apart; what is beyond that counts as one."""

_CONTENT_SHOWN = 2000
"""Characters of a row that the report shows."""


@dataclass(frozen=True)
class IndexOptions:
    """What, besides the rows and the tokenizer, decides the tokens."""

    max_seq_length: int
    overlong: str = "drop"
    """``drop`` samples of more than ``max_seq_length`` tokens, ``truncate`` them behind their last assistant turn that
    fits, or ``split-error``: stop with an error that names them."""
    system_prompt: str | None = None
    gsm8k_style: str = "plain"
    tir_style: str = "tool_calls"
    chat: ChatOptions = ChatOptions()  # noqa: RUF009 (frozen)
    against: tuple[str, ...] = ()
    """Benchmarks whose questions are looked for, such as ``gsm8k:test``."""
    decontaminate: bool = False
    """Drop the rows whose questions are found there."""

    @staticmethod
    def of(config: RunConfig) -> IndexOptions:
        """A run's choices."""
        chat = ChatOptions(config.chat_family, config.chat_date, config.reasoning_effort)
        same = (f.name for f in fields(IndexOptions) if f.name != "chat")
        return IndexOptions(chat=chat, **{name: getattr(config, name) for name in same})


class Rows(NamedTuple):
    """Neighbouring rows of a source."""

    first: int
    """Number of the first one."""
    rows: list[dict[str, Any]]


class Drop(NamedTuple):
    """A row that is not trained on."""

    row: int
    problem: str
    content: str
    """The row as JSON, perhaps cut."""


@dataclass
class Drops:
    """Rows counted out, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Drop]] = field(default_factory=dict)

    def add(self, number: int, row: Mapping[str, Any], problem: str, reason: str | None = None) -> None:
        """Counts a row; the first of each reason are kept as examples."""
        reason = reason or reason_of(problem)
        if reason not in self.counts and len(self.counts) >= REASONS_KEPT:
            reason = "other reasons"
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES_KEPT:
            examples.append(Drop(number, _printable(problem), _content(row)))

    def merge(self, other: Drops) -> None:
        for reason, count in other.counts.items():
            kept = reason if reason in self.counts or len(self.counts) < REASONS_KEPT else "other reasons"
            self.counts[kept] += count
            examples = self.examples.setdefault(kept, [])
            examples += other.examples[reason][: EXAMPLES_KEPT - len(examples)]

    def summary(self) -> dict[str, Any]:
        """Reason -> count and examples, the commonest first."""
        return {
            reason: {"count": count, "examples": [drop._asdict() for drop in self.examples[reason]]}
            for reason, count in self.counts.most_common()
        }


@dataclass
class Prepared:
    """What became of a chunk of rows."""

    rows: int
    input_ids: NDArray[np.int32]
    """[tokens]."""
    loss_mask: NDArray[np.bool_]
    """[tokens]."""
    lengths: NDArray[np.int64]
    """[samples]."""
    supervised: int
    """Targets: tokens in the loss mask, but for first tokens, which nothing predicts."""
    truncated: int
    drops: Drops
    overlaps: Counter[tuple[str, str]]
    """(benchmark, kind of overlap) -> rows."""
    overlong: list[tuple[int, int]]
    """(row, tokens) of the rows that ``split-error`` refuses."""


@dataclass(frozen=True)
class Preparation:
    """A function from rows to samples that can be sent to another process."""

    source: SourceConfig
    """With its format resolved."""
    tokenizer: PreTrainedTokenizerBase
    options: IndexOptions
    contamination: Contamination | None = None

    def __call__(self, chunk: Rows) -> Prepared:
        drops, overlaps = Drops(), Counter[tuple[str, str]]()
        numbers: list[int] = []
        conversations: list[Conversation] = []
        for position, row in enumerate(chunk.rows):
            try:
                conversation = self.conversation(row)
            except DataError as error:
                drops.add(chunk.first + position, row, error.problems[0])
                continue
            if not self._contaminated(chunk.first + position, row, conversation, drops, overlaps):
                numbers.append(position)
                conversations.append(conversation)
        rendered = renderer(self.tokenizer, self.options.chat).chunk(conversations)
        for number, refusal in rendered.errors.items():
            drops.add(chunk.first + numbers[number], chunk.rows[numbers[number]], refusal.problems[0])
        return self._fitted(chunk, numbers, rendered, drops, overlaps)

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """The row as a valid conversation.

        Raises:
            DataError: it cannot be one.
        """
        source, options = self.source, self.options
        example = format_example(
            row,
            format=source.format,
            question_field=source.question_field,
            answer_field=source.answer_field,
            messages_field=source.messages_field,
            tool_calls_field=source.tool_calls_field,
            tool_name_field=source.tool_name_field,
            tool_input_field=source.tool_input_field,
            tool_output_field=source.tool_output_field,
            system_prompt=options.system_prompt,
            gsm8k_style=options.gsm8k_style,
            tir_style=options.tir_style,
        )
        return validate_conversation(example["messages"], example["tools"])

    def _contaminated(
        self,
        number: int,
        row: Mapping[str, Any],
        conversation: Conversation,
        drops: Drops,
        overlaps: Counter[tuple[str, str]],
    ) -> bool:
        """Whether the row is dropped because a benchmark asks its question; an overlap is counted either way."""
        if self.contamination is None:
            return False
        found = self.contamination.find(question_of(conversation.messages))
        if found is None:
            return False
        overlaps[found.benchmark, found.kind] += 1
        if self.options.decontaminate:
            reason = f"contaminated: the question is also in {found.benchmark} ({found.kind})"
            drops.add(number, row, f"{reason}: {found.text!r}", reason)
        return self.options.decontaminate

    def _fitted(
        self, chunk: Rows, numbers: list[int], rendered: Chunk, drops: Drops, overlaps: Counter[tuple[str, str]]
    ) -> Prepared:
        """The rendered samples within the length limit, their number of tokens made to fit or the row dropped."""
        limit = self.options.max_seq_length
        lengths = np.diff(rendered.offsets)
        kept = lengths.copy()  # tokens of each sample that are kept
        overlong: list[tuple[int, int]] = []
        for number in np.flatnonzero(lengths > limit).tolist():
            row = numbers[number]
            if self.options.overlong == "split-error":
                overlong.append((chunk.first + row, int(lengths[number])))
            kept[number] = _last_turn_end(rendered, number, limit) if self.options.overlong == "truncate" else 0
            if not kept[number]:
                whole = " and not even its first assistant turn fits" if self.options.overlong == "truncate" else ""
                problem = f"{lengths[number]} tokens are more than --max-seq-length {limit}{whole}"
                drops.add(chunk.first + row, chunk.rows[row], problem)
        within = np.arange(len(rendered.input_ids)) - np.repeat(rendered.offsets[:-1], lengths)
        taken = within < np.repeat(kept, lengths)
        return Prepared(
            rows=len(chunk.rows),
            input_ids=rendered.input_ids[taken],
            loss_mask=rendered.loss_mask[taken],
            lengths=kept[kept > 0],
            supervised=int(np.count_nonzero(rendered.loss_mask & taken & (within > 0))),
            truncated=int(np.count_nonzero((kept > 0) & (kept < lengths))),
            drops=drops,
            overlaps=overlaps,
            overlong=overlong,
        )


def reason_of(problem: str) -> str:
    """A problem without what is particular to its row, so that equal problems are counted together."""
    problem = re.sub(r"'[^']*'|\"[^\"]*\"", "…", problem)
    return _printable(re.sub(r"(?<![\w.-])\d+(?![\w.])", "N", problem))


def _last_turn_end(chunk: Chunk, number: int, limit: int) -> int:
    """Tokens up to the end of the sample's last assistant turn that fits; 0 if none does.

    A turn ends with a control token, its last target or the one after that; a run of targets that merely stops before
    text that is kept out of the loss does not.
    """
    start, end = int(chunk.offsets[number]), int(chunk.offsets[number + 1])
    turn_ends = chunk.turn_ends[start : min(end, start + limit)]
    places = np.flatnonzero(turn_ends)
    return int(places[-1]) + 1 if len(places) else 0


def _content(row: Mapping[str, Any]) -> str:
    text = _printable(json.dumps(row, ensure_ascii=False, default=str))
    return text if len(text) <= _CONTENT_SHOWN else f"{text[:_CONTENT_SHOWN]} …"


def _printable(text: str) -> str:
    """Text that a file can hold: lone surrogates are written as their code."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
