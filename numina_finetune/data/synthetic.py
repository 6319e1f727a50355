"""The embedded data set: generated word problems in GSM8K's format, whose test arithmetic training never shows.

A problem is a row ``{"question", "answer"}`` as ``openai/gsm8k`` has it: a short story, a solution with one calculator
annotation a step, ``48+7 = <<48+7=55>>55 apples``, and a last line ``#### 55``.

What makes the test split honest is the rule about **operand pairs**. The unordered pair of numbers of every step
(``{7, 48}`` above) belongs to one split for good, whatever the operation and the seed: a hash of the pair decides. So
no step of a test problem can be answered from memory. Pairs of two one-digit numbers are facts that can only be
memorised (``3+4``); they always belong to training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from operator import add, sub

DEFAULT_COUNTS = {"train": 16_000, "test": 256}
TEST_SHARE = 0.15
"""Share of the operand pairs that belong to the test split."""
MOST_REPEATS = 10_000
"""So many questions in a row that were there already mean that there are hardly others."""
LARGEST = 999
"""No operand and no result is larger."""
LARGEST_CHANGE = 5
"""What a step adds or takes away is from 2 to this."""

OPERATIONS = {"+": add, "-": sub}
SHARES = {"+": 4, "-": 4, "++": 1, "+-": 1, "-+": 1, "--": 1, "+-+": 2, "-+-": 2, "++-": 2, "--+": 2}
"""Relative frequency of the problems by the operations of their steps."""

PEOPLE = {
    "Tom": "He",
    "Ana": "She",
    "Ben": "He",
    "Mia": "She",
    "Sam": "He",
    "Lily": "She",
    "Omar": "He",
    "Nina": "She",
    "Leo": "He",
    "Ruth": "She",
    "Ivan": "He",
    "Zoe": "She",
}
"""Names and their pronouns."""
ITEMS = ("apples", "pencils", "marbles", "stickers", "books", "cards", "shells", "coins", "eggs", "stamps")

SINGLE = {
    "+": (
        "{name} has {a} {item} and {friend} has {b}. How many {item} do they have together?",
        "A box has {a} red {item} and {b} blue {item}. How many {item} are in the box?",
        "{name} has {a} {item}. {friend} has {b} more. How many {item} does {friend} have?",
    ),
    "-": (
        "{name} wants {a} {item} and has {b}. How many more {item} does {name} need?",
        "{name} has {a} {item}. {friend} has {b} fewer. How many {item} does {friend} have?",
        "There were {a} {item} in a box. {name} took {b}. How many {item} are left?",
    ),
}
"""Questions of one step by its operation; ``{a}`` and ``{b}`` are its operands."""

CHAIN = "{name} has {a} {item}. {pronoun} {changes}. How many {item} does {name} have now?"
CHANGES = {
    "+": ("buys {b} more", "finds {b}", "gets {b} from {friend}"),
    "-": ("gives {b} to {friend}", "loses {b}", "sells {b}"),
}
"""What happens in one step of a longer story."""

Pair = tuple[int, int]


def generate_problems(split: str, seed: int = 0, count: int | None = None) -> list[dict[str, str]]:
    """Rows ``{"question", "answer"}`` of one split, the same for the same arguments on every machine.

    Args:
        split: ``train`` or ``test``.
        seed: other seeds give other problems under the same rule of operand pairs.
        count: number of rows; the split's default if None. No question occurs twice.

    Raises:
        ValueError: an unknown split, or more rows than there are different questions to ask.
    """
    if split not in DEFAULT_COUNTS:
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join(DEFAULT_COUNTS)}")
    wanted = DEFAULT_COUNTS[split] if count is None else count
    rng = random.Random(f"numina-finetune/{split}/{seed}")
    rows: dict[str, dict[str, str]] = {}
    repeats = 0
    while len(rows) < wanted:
        row = _problem(rng, split)
        repeats = repeats + 1 if row["question"] in rows else 0
        if repeats == MOST_REPEATS:
            raise ValueError(
                f"count {wanted} is too large: the {split} split has hardly more than {len(rows)} questions"
            )
        rows[row["question"]] = row
    return list(rows.values())


def is_test_pair(left: int, right: int) -> bool:
    """Whether the unordered pair of operands belongs to the test split."""
    low, high = sorted((left, right))
    if high < 10:
        return False
    digest = hashlib.sha256(f"held out: {low},{high}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32


def _problem(rng: random.Random, split: str) -> dict[str, str]:
    operations = rng.choices(tuple(SHARES), tuple(SHARES.values()))[0]
    steps = _steps(rng, split, operations)
    name, friend = rng.sample(sorted(PEOPLE), 2)
    words: dict[str, str | int] = {
        "name": name,
        "friend": friend,
        "pronoun": PEOPLE[name],
        "item": rng.choice(ITEMS),
        "a": steps[0][0],
    }
    results = [OPERATIONS[operation](*step) for operation, step in zip(operations, steps, strict=True)]
    solution = [
        f"{left}{operation}{right} = <<{left}{operation}{right}={result}>>{result} {words['item']}"
        for operation, (left, right), result in zip(operations, steps, results, strict=True)
    ]
    return {
        "question": _question(rng, operations, [right for _, right in steps], words),
        "answer": "\n".join([*solution, f"#### {results[-1]}"]),
    }


def _question(rng: random.Random, operations: str, rights: list[int], words: dict[str, str | int]) -> str:
    if len(operations) == 1:
        return rng.choice(SINGLE[operations]).format(b=rights[0], **words)
    changes = [
        rng.choice(CHANGES[operation]).format(b=right, **words)
        for operation, right in zip(operations, rights, strict=True)
    ]
    told = ", ".join(changes[:-1]) + " and " + changes[-1]
    return CHAIN.format(changes=told, **words)


def _steps(rng: random.Random, split: str, operations: str) -> list[Pair]:
    """Operands of every step; the left operand of a later step is the result of the step before."""
    while True:
        steps = [rng.choice(_pairs(split, operations[0]))]
        for before, operation in pairwise(operations):
            left = OPERATIONS[before](*steps[-1])
            following = [pair for pair in _pairs(split, operation) if pair[0] == left]
            if not following:
                break
            steps.append(rng.choice(following))
        else:
            return steps


@cache
def _pairs(split: str, operation: str) -> tuple[Pair, ...]:
    """Every (left, right) of an operation that a split may use, in order."""
    return tuple(pair for pair in _all_pairs(operation) if is_test_pair(*pair) == (split == "test"))


def _all_pairs(operation: str) -> Iterator[Pair]:
    for left in range(2, LARGEST + 1):
        for right in range(2, LARGEST_CHANGE + 1):
            if 2 <= OPERATIONS[operation](left, right) <= LARGEST:
                yield left, right
