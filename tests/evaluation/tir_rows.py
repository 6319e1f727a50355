"""Real tool-integrated solutions run again: what was recorded against what the sandbox gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from numina_finetune.data.tir import parse
from numina_finetune.errors import DataError
from numina_finetune.evaluation.sandbox import Limits, Sandbox


class Comparison(NamedTuple):
    """One block."""

    problem: str
    number: int
    code: str
    recorded: str
    output: str
    kind: str


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


LIMITS = Limits(wall_seconds=60, output_chars=None)
"""Time enough on a busy machine for what took less than the recorder's limit."""


def compare(row: dict[str, Any]) -> list[Comparison]:
    """The python blocks of a solution that an output block follows, run in order in one interpreter.

    A row ends before the first block that was recorded as timed out.
    """
    try:
        blocks = [block for block in parse(row["solution"]) if block.kind != "prose" or block.text.strip()]
    except DataError:
        return []
    found: list[Comparison] = []
    with Sandbox(LIMITS) as sandbox:
        for code, output in pairwise(blocks):
            if code.kind == "python" and output.kind == "output":
                if TIMED_OUT.search(output.body):  # as depends on the machine, and so does what came after it
                    break
                execution = sandbox.run(code.body)
                kind = kind_of(output.body, execution.output)
                found.append(Comparison(row["problem"], len(found), code.body, output.body, execution.output, kind))
    return found


def kind_of(recorded: str, output: str) -> str:
    """``same``, or how the two differ."""
    if squeezed(recorded) == squeezed(output):
        return "same"
    if "Traceback" in recorded and error_of(output) == error_of(recorded):
        return "same error, told otherwise"
    if NUMBER.sub("", squeezed(recorded)) == NUMBER.sub("", squeezed(output)) and numbers_agree(recorded, output):
        return "last digits"
    return "order" if sorted(squeezed(recorded)) == sorted(squeezed(output)) else "other"


TIMED_OUT = re.compile(r"Timeout waiting for reply|Timed Out")
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def error_of(text: str) -> str:
    """The line that names it."""
    return text.rstrip("\n").rpartition("\n")[2].strip()


def numbers_agree(left: str, right: str) -> bool:
    pairs = zip(NUMBER.findall(left), NUMBER.findall(right), strict=True)
    return all(abs(float(one) - float(other)) <= 1e-9 * max(1.0, abs(float(one))) for one, other in pairs)


def squeezed(text: str) -> str:
    """Without white space."""
    return re.sub(r"\s+", "", text)
