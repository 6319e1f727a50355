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


def compare(row: dict[str, Any], limits: Limits) -> list[Comparison]:
    """Every python block of a solution that an output block follows, run in order in one interpreter."""
    try:
        blocks = [block for block in parse(row["solution"]) if block.kind != "prose" or block.text.strip()]
    except DataError:
        return []
    found = []
    with Sandbox(limits) as sandbox:
        for code, output in pairwise(blocks):
            if code.kind == "python" and output.kind == "output":
                execution = sandbox.run(code.body)
                kind = kind_of(output.body, execution.output)
                found.append(Comparison(row["problem"], len(found), code.body, output.body, execution.output, kind))
    return found


def kind_of(recorded: str, output: str) -> str:
    """``same``, or how the two differ."""
    if squeezed(recorded) == squeezed(output):
        return "same"
    return "differs"


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)
