r"""What the final answer of a solution is, and whether two answers are the same.

The GSM8K styles are those of EleutherAI's lm-evaluation-harness, which published figures quote
(``lm_eval/tasks/gsm8k/gsm8k.yaml``): ``strict-match`` takes the first ``#### N``, ``flexible-extract`` the last
number. ``boxed`` takes the last ``\boxed{…}``, as MATH and NuminaMath write it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Literal

Style = Literal["gsm8k", "gsm8k-flexible", "boxed"]

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
BOX = re.compile(r"\\boxed\s*\{")
IGNORED = re.compile(r",|\$|(?s:.*)#### |\.$")
"""What the harness deletes from both answers before it compares them."""

Z_95 = 1.959963984540054
"""Two-sided 95% quantile of the normal distribution."""


def extract_answer(text: str, *, style: Style = "gsm8k") -> str | None:
    """The final answer in a solution as written there, or None where it gives none.

    Raises:
        ValueError: an unknown style.
    """
    if style == "gsm8k":
        match = STRICT.search(text)
        return match.group(1).strip() if match else None
    if style == "gsm8k-flexible":
        numbers = FLEXIBLE.findall(text)
        return numbers[-1].strip() if numbers else None
    if style == "boxed":
        return _last_box(text)
    raise ValueError(f"style {style!r} is unknown: use gsm8k, gsm8k-flexible or boxed")


def answers_match(gold: str | None, predicted: str | None) -> bool:
    """Whether two extracted answers are equal as text after normalisation, or as numbers (``18`` and ``18.00``).

    A missing answer matches nothing, not even another missing one. ``gold`` may be a whole GSM8K solution.
    """
    if gold is None or predicted is None:
        return False
    left, right = normalise(gold), normalise(predicted)
    if left == right:
        return True
    left_number, right_number = _number(left), _number(right)
    return left_number is not None and left_number == right_number


def normalise(answer: str) -> str:
    """The answer without what the harness ignores: thousands separators, ``$``, text up to ``#### ``, a final dot."""
    return IGNORED.sub("", answer.strip()).strip().lower()


def majority_baseline(golds: Sequence[str]) -> float:
    """Accuracy of always giving the most frequent answer; 0 for no answers."""
    counts = Counter(normalise(gold) for gold in golds)
    return max(counts.values()) / len(golds) if golds else 0.0


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share, from ``correct`` out of ``n``; (0, 1) where nothing was tried."""
    if n == 0:
        return 0.0, 1.0
    share, spread = correct / n, Z_95**2 / n
    centre = share + spread / 2
    half = Z_95 * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def wilson_lower(correct: int, n: int) -> float:
    """The lower end of :func:`wilson_interval`."""
    return wilson_interval(correct, n)[0]


def _last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{…}`` whose braces balance."""
    for match in reversed(list(BOX.finditer(text))):
        end = _closing_brace(text, match.end())
        if end is not None:
            return text[match.end() : end].strip()
    return None


def _closing_brace(text: str, start: int) -> int | None:
    r"""Position of the brace that closes the one before ``start``; escaped braces (``\{``) do not count."""
    depth = 1
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
