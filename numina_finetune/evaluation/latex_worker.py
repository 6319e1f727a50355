"""Compares LaTeX answers in a process of its own, for :mod:`numina_finetune.evaluation.latex`.

Started by its path, so that it needs nothing of this package. It reads ``[gold, predicted]`` as JSON, a pair a line,
and writes ``true`` or ``false``; the first line that it writes says that it is ready.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys

CPU_SECONDS = 5.0
"""For one pair. Processor time, not the clock's, so that verdicts do not depend on what else the machine does."""
MEMORY_BYTES = 4 << 30

_DELIMITED = re.compile(r"(?<!\\)\$|\\boxed|\\\(|\\\[|\\begin\{align")


def main() -> None:
    """Answer until there are no more questions."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints stays out of the answers
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # whose signal ends this process
        gold, predicted = (parse(delimited(text), parsing_timeout=None) for text in json.loads(line))
        equal = bool(verify(gold, predicted, timeout_seconds=None))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(equal), file=answers, flush=True)


def delimited(text: str) -> str:
    """The text as one formula, unless it says itself where its formulas are."""
    return text if _DELIMITED.search(text) else f"${text}$"


if __name__ == "__main__":
    main()
