"""Run the python blocks of real tool-integrated solutions in the sandbox, and compare with what was recorded.

    python benchmarks/tir_sandbox.py ../shared/data/tir/*.jsonl --out disagreements.jsonl
    python benchmarks/tir_sandbox.py --startup

A block agrees if its output is the recorded one but for white space. Disagreements are sorted by what differs;
``--out`` writes them all, to be read.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from numina_finetune.evaluation.sandbox import Sandbox
from tests.evaluation.tir_rows import LIMITS, Comparison, compare, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, help="where disagreements are written, one JSON object a line")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--startup", action="store_true", help="time the start of sandboxes instead")
    arguments = parser.parse_args()
    if arguments.startup:
        time_startup()
        return
    found: list[dict[str, Any]] = []
    for file in arguments.files:
        begin = time.monotonic()
        with ThreadPoolExecutor(arguments.workers) as pool:
            blocks = [block for row in pool.map(compare, read_rows(file)) for block in row]
        print(f"{file.name}: {figures(blocks)}; {time.monotonic() - begin:.0f} s")
        found += [{"file": file.name} | block._asdict() for block in blocks if block.kind != "same"]
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")


def figures(blocks: Iterable[Comparison]) -> str:
    kinds = Counter(block.kind for block in blocks)
    return f"{kinds['same']} of {kinds.total()} blocks agree; " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def time_startup(problems: int = 50) -> None:
    """Print milliseconds for a problem: a new sandbox, ``import sympy``, and its end."""
    with Sandbox(LIMITS) as sandbox:
        sandbox.run("1")
    begin = time.monotonic()
    for _ in range(problems):
        with Sandbox(LIMITS) as sandbox:
            sandbox.run("import sympy; sympy.sqrt(8)")
    print(f"{(time.monotonic() - begin) / problems * 1000:.1f} ms a problem")


if __name__ == "__main__":
    main()
