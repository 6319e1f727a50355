r"""What the final answer of a solution is, and whether two answers are the same.

The GSM8K styles are those of EleutherAI's lm-evaluation-harness, which published figures quote
(``lm_eval/tasks/gsm8k/gsm8k.yaml``): ``strict-match`` takes the first ``#### N``, ``flexible-extract`` the last
number. ``boxed`` takes the last ``\boxed{…}``, as MATH and NuminaMath write it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

from numina_finetune.evaluation.latex import equivalent

Style = Literal["gsm8k", "gsm8k-flexible", "boxed"]

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
BOX = re.compile(r"\\boxed\s*\{")
IGNORED = re.compile(r",|\$|(?s:.*)#### |\.$")
"""What the harness deletes from both answers before it compares them."""
_NUMBER = re.compile(r"[+-]?(?:[1-9]\d{0,2}(?P<mark>,|\{,\}|\\[,!]| )\d{3}(?:(?P=mark)\d{3})*|\d+)?(?:\.\d*)?")
"""A number, perhaps with a mark between thousands; digits may be missing altogether."""


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
    r"""Whether two extracted answers are the same: as text, as numbers (``18`` and ``18.00``), or to math-verify.

    A missing answer matches nothing, not even another missing one. ``gold`` may be a whole GSM8K solution. Two plain
    numbers are compared exactly; whatever else differs as text is compared as LaTeX (:mod:`.latex`), where
    ``\frac12`` is ``0.5``.
    """
    if gold is None or predicted is None:
        return False
    gold = gold.rpartition("#### ")[2]
    left, right = _bare(gold), _bare(predicted)
    if left == right:
        return True
    left_number, right_number = _number(left), _number(right)
    if left_number is not None and right_number is not None:
        return left_number == right_number
    return bool(left and right) and equivalent(gold, predicted)


def same_in_harness(gold: str | None, predicted: str | None) -> bool:
    """Whether the harness counts two extracted GSM8K answers as equal: as text, once both are normalised."""
    return gold is not None and predicted is not None and normalise(gold) == normalise(predicted)


def normalise(answer: str) -> str:
    """The answer without what the harness ignores: thousands separators, ``$``, text up to ``#### ``, a final dot."""
    return IGNORED.sub("", answer.strip()).strip().lower()


def majority_baseline(golds: Sequence[str]) -> float:
    """Accuracy of always giving the most frequent answer; 0 for no answers."""
    counts = Counter(normalise(gold) for gold in golds)
    return max(counts.values()) / len(golds) if golds else 0.0


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


def _bare(answer: str) -> str:
    """The answer without the dollar signs around it, which are money or mark a formula, and a final dot."""
    return re.sub(r"\\?\$", "", answer).strip().removesuffix(".").strip()


def _number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text)
    if match is None or not any(character.isdigit() for character in text):
        return None
    return Decimal(text.replace(match["mark"], "") if match["mark"] else text)
