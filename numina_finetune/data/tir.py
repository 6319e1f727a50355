"""NuminaMath-TIR's code blocks as tool calls, and back, byte for byte.

A tool-integrated solution is one text in which code and what it printed take turns with prose::

    First the discriminant.
    ```python
    print(5**2 - 4 * 6)
    ```
    ```output
    1
    ```
    So the roots are \\boxed{2} and \\boxed{3}.

The layout is that of https://huggingface.co/datasets/AI-MO/NuminaMath-TIR. A model that is trained on it as it stands
learns to invent the output; so each python block becomes a call of the tool ``python``, its output block the call's
answer, and the prose the content of the turns. The newline between two parts is implied; any further white space stays
in the part, so that ``from_messages`` gives the very text again.

Texts that cannot be converted so are refused with their reason: a python block without its output block (a call needs
its answer), an output block without code, a fence that is never closed, no prose after the last output (there would be
no final turn), and fences with white space of their own around them, which the messages could not give back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from numina_finetune.data.conversation import Message
from numina_finetune.data.rounds import call_round, rebuilt
from numina_finetune.errors import DataError

PYTHON = "python"

PYTHON_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": PYTHON,
        "description": (
            "Runs Python code and returns what it wrote: printed text, the traceback if it failed, and the value of "
            "the last expression, echoed as an interactive session does. One interpreter serves the whole "
            "conversation, so imports, names and values of earlier calls are still there."
        ),
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The Python code to run."}},
            "required": ["code"],
            "additionalProperties": False,
        },
    },
}
"""The tool that the calls name, as OpenAI's API defines tools; evaluation keeps to what its description says."""

Kind = Literal["prose", "python", "output"]


class Block(NamedTuple):
    """A part of the text, exactly as it stands there."""

    kind: Kind
    text: str
    """With its fence lines, and the newline that ends the last of them."""

    @property
    def body(self) -> str:
        """What is between the fence lines of a python or output block: whole lines, each with its newline."""
        return self.text[self.text.index("\n") + 1 : self.text.rindex("```")]


class Round(NamedTuple):
    """Code that was run."""

    prose: str
    code: Block
    output: Block


_KINDS: dict[str, Kind] = {"python": "python", "output": "output"}
_OPENING = re.compile(r"```(\w*)[ \t\r]*\n")
_FENCE_LINE = re.compile(r"\n```(\w*)[ \t\r]*(?=\n|\Z)")
_RUN = re.compile(r"\n```[ \t\r]*\n\s*```output[ \t\r]*\n")


def has_code(text: str) -> bool:
    """Whether there is a python fence at all."""
    return "```python" in text


def has_runs(text: str) -> bool:
    """Whether a python block is followed by an output block, as nothing but a tool-integrated solution has it."""
    return "```python" in text and _RUN.search(text) is not None


# --- text -> blocks ---------------------------------------------------------------------------------------------------


def parse(text: str) -> list[Block]:
    """The text as blocks, in order; no block is empty, and their texts joined are the text.

    A block ends at the first line that is ``` alone. Only code may hold such a line (in a string): its block ends
    where an output block follows, if it does before the next python or output fence. Blocks in other languages are
    prose.

    Raises:
        DataError: a fence is never closed.
    """
    blocks: list[Block] = []
    counts: dict[Kind, int] = {"python": 0, "output": 0}
    done = position = 0
    while opening := _OPENING.search(text, position):
        kind = _KINDS.get(opening[1])
        begins_line = opening.start() == 0 or text[opening.start() - 1] == "\n"
        if kind is not None:
            counts[kind] += 1
            position = _end(text, opening.end(), f"{kind} block {counts[kind]}", is_code=kind == "python")
            if opening.start() > done:
                blocks.append(Block("prose", text[done : opening.start()]))
            blocks.append(Block(kind, text[opening.start() : position]))
            done = position
        elif begins_line:
            position = _end(text, opening.end(), f"the block that opens with ```{opening[1]}")
        else:
            position = opening.end()
    if done < len(text):
        blocks.append(Block("prose", text[done:]))
    return blocks


def rebuild(blocks: Sequence[Block]) -> str:
    """The inverse of :func:`parse`."""
    return "".join(block.text for block in blocks)


def _end(text: str, start: int, what: str, is_code: bool = False) -> int:
    """Where the block ends whose body starts at ``start``: behind its closing fence line."""
    end = None
    for fence in _FENCE_LINE.finditer(text, start - 1):
        if fence[1] in ("python", "output"):
            break
        if fence[1]:
            continue  # another language's fence inside a string
        if end is None:
            end = fence.end()
        if not is_code or text.startswith("\n```output", fence.end()):
            end = fence.end()
            break
    if end is None:
        raise DataError(f"{what}: its fence is never closed: end it with a line of ``` alone, or leave the row out")
    return min(end + 1, len(text))


def _rounds(blocks: Sequence[Block]) -> tuple[list[Round], str]:
    """The rounds of code and output, and the prose after the last.

    White space between a python block and its output block is passed over.

    Raises:
        DataError: code without output, output without code, or no prose at the end (of a text with code).
    """
    rounds: list[Round] = []
    prose = ""
    code: Block | None = None
    for block in blocks:
        if block.kind == "output":
            if code is None:
                raise DataError(
                    f"output block {len(rounds) + 1}: no python block stands right before it: add the code, "
                    "or leave the row out"
                )
            rounds.append(Round(prose, code, block))
            prose, code = "", None
        elif code is not None and (block.kind == "python" or block.text.strip()):
            break
        elif block.kind == "python":
            code = block
        elif code is None:
            prose = block.text
    if code is not None:
        raise DataError(
            f"python block {len(rounds) + 1}: no output block stands right after it, so its call has no answer: "
            "add the output, or leave the row out"
        )
    if rounds and not prose.strip():
        raise DataError(f"no prose after output block {len(rounds)}, so there is no final answer: leave the row out")
    return rounds, prose


# --- text <-> messages ------------------------------------------------------------------------------------------------


def to_messages(text: str) -> list[Message]:
    """The solution as assistant and tool messages: for each round a call (``call_1``, …) and its answer, then the rest.

    A text without code is one assistant message. ``from_messages`` is the inverse.

    Raises:
        DataError: the text cannot be converted and converted back (the module's docstring lists why).
    """
    if "```" not in text:
        return [{"role": "assistant", "content": text}]
    rounds, final = _rounds(parse(text))
    messages: list[Message] = []
    for number, (prose, code, output) in enumerate(rounds, 1):
        before = prose.removesuffix("\n") if prose else None
        arguments = {"code": _without_newline(code.body)}
        messages += call_round(number, before, PYTHON, arguments, _without_newline(output.body))
    messages.append({"role": "assistant", "content": final})
    if (again := from_messages(messages)) != text:
        raise DataError(_difference(text, again))
    return messages


def from_messages(messages: Sequence[Message]) -> str:
    """The text that :func:`to_messages` made these assistant and tool messages of.

    Raises:
        DataError: they are not of its kind.
    """
    return rebuilt(messages, PYTHON, _round_text)


def _round_text(prose: str | None, arguments: dict[str, Any], result: str) -> str:
    before = "" if prose is None else prose + "\n"
    return f"{before}```python\n{_with_newline(arguments['code'])}```\n```output\n{_with_newline(result)}```\n"


def output_ranges(text: str) -> list[list[int]]:
    """Where the interpreter wrote: [start, end] of each output block's body and closing fence line, ascending.

    The line that opens the block is the model's own: it is what stops the model, so that the interpreter takes over.

    Raises:
        DataError: as for :func:`to_messages`, but white space around fences is no fault, as the text stays as it is.
    """
    if "```" not in text:
        return []
    blocks = parse(text)
    _rounds(blocks)
    ranges = []
    end = 0
    for block in blocks:
        end += len(block.text)
        if block.kind == "output":
            ranges.append([end - len(block.text) + block.text.index("\n") + 1, end])
    return ranges


def _without_newline(body: str) -> str:
    """Lines without the last newline; nothing but newlines stays, so that "" and one empty line remain apart."""
    return body[:-1] if body.strip("\n") else body


def _with_newline(content: str) -> str:
    return content + "\n" if content.strip("\n") else content


def _difference(text: str, again: str) -> str:
    place = next((at for at, (left, right) in enumerate(zip(text, again, strict=False)) if left != right), len(again))
    return (
        f"the white space around the fences at character {place} ({text[max(place - 20, 0) : place + 20]!r}) would be "
        "lost in tool calls: mend the row, or use --tir-style text"
    )
