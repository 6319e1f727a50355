r"""Does a training question also stand in a benchmark's test split?

Questions are compared as words, so that typesetting makes no difference::

    What is $\dfrac12x^{2}$?
    what is  $\frac{1}{2} x^2$       ->  what is frac 1 2 x 2

Two questions overlap where all their words and brackets are equal ("exact"), or where they share ``n`` words in a row,
numbers included ("ngram"). The same template with other numbers is another problem: it overlaps only where ``n`` words
stand between the numbers.

Thirteen words are the field's custom (T. Brown et al., "Language models are few-shot learners", 2020, appendix C), and
right for these benchmarks: GSM8K's test questions have 44 words in the median and none has fewer than 16; of its 7473
training questions 4 share 13 words in a row with the test split (the same templates), and 98 share 8, mostly stock
phrases. Two more rules keep stock phrases out: words that more than ``SHARED_BY`` questions of the benchmark share
identify none of them, and drawings (Asymptote code) count for an exact match only. What is left is still a suspicion,
to be read: formulas in general form remain, and "where m and n are relatively prime positive integers". A question of
fewer than ``n`` words is found as a whole only, which leaves it unseen inside a longer prompt.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from numina_finetune.data.conversation import Message
from numina_finetune.errors import ConfigError, DataError

NGRAM_WORDS = 13

SHARED_BY = 2
"""Questions of one benchmark that may share an n-gram before it counts as a stock phrase."""

SHOWN_WORDS = 20
"""Words of an exact match that are shown."""


@dataclass(frozen=True)
class Overlap:
    """A training question that a benchmark holds too."""

    benchmark: str
    kind: Literal["exact", "ngram"]
    text: str
    """The shared words; of an exact match, the first of them."""
    index: int
    """The question's place in the benchmark, from 0."""


@dataclass(frozen=True)
class Benchmark:
    """One test split, indexed by whole questions and by n-grams; see :func:`build_benchmark`."""

    name: str
    n: int
    whole: dict[str, int]
    """Question, as of :func:`whole_question` -> its index, the first one's where several are equal."""
    vocabulary: dict[str, int]
    """Word -> its number, from 1; 0 stands for any other word."""
    words: NDArray[np.int32]
    """[words of all questions], one question after the other."""
    owners: NDArray[np.int32]
    """[words of all questions], the index of each word's question."""
    hashes: NDArray[np.uint64]
    """[n-grams], ascending, each once."""
    starts: NDArray[np.int32]
    """[n-grams], where in ``words`` each begins."""

    def find(self, key: str, words: Sequence[str]) -> Overlap | None:
        """The overlap of a question with this benchmark.

        Args:
            key: the whole question, as of :func:`whole_question`.
            words: what n-grams are made of, as of :func:`ngram_words`.
        """
        if key in self.whole:
            return Overlap(self.name, "exact", " ".join(words[:SHOWN_WORDS]), self.whole[key])
        if len(words) < self.n or not len(self.hashes):
            return None
        numbers = np.array([self.vocabulary.get(word, 0) for word in words], dtype=np.int32)
        hashes = _ngram_hashes(numbers, self.n)
        places = self.hashes.searchsorted(hashes)
        for position in (self.hashes.take(places, mode="clip") == hashes).nonzero()[0].tolist():
            start = int(self.starts[places[position]])
            # another n-gram may have the same hash, one with words that the benchmark does not hold among them
            if np.array_equal(self.words[start : start + self.n], numbers[position : position + self.n]):
                shared = " ".join(words[position : position + self.n])
                return Overlap(self.name, "ngram", shared, int(self.owners[start]))
        return None


class Contamination:
    """Looks questions up in several benchmarks."""

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        self.benchmarks = list(benchmarks)

    def find(self, question: str) -> Overlap | None:
        """The first overlap in the order of the benchmarks, exact ones before n-grams; None where there is none."""
        tokens = _tokens(question)
        key = _key(tokens)
        words = ngram_words(question) if "[asy]" in question else _words(tokens)
        found = None
        for benchmark in self.benchmarks:
            overlap = benchmark.find(key, words)
            if overlap and overlap.kind == "exact":
                return overlap
            found = found or overlap
        return found


def build_benchmark(name: str, questions: Iterable[str], n: int = NGRAM_WORDS) -> Benchmark:
    """Index a test split's questions.

    Raises:
        ConfigError: ``n`` is below 1.
        DataError: no question has a word in it.
    """
    if n < 1:
        raise ConfigError(f"benchmark {name}: n-grams of {n} words cannot be, use 1 or more (the custom is 13)")
    whole: dict[str, int] = {}
    vocabulary: dict[str, int] = {}
    numbers: list[int] = []
    owners: list[int] = []
    for index, question in enumerate(questions):
        key = whole_question(question)
        if not key or key in whole:
            continue
        whole[key] = index
        words = ngram_words(question)
        numbers += [vocabulary.setdefault(word, len(vocabulary) + 1) for word in words]
        owners += [index] * len(words)
    if not whole:
        raise DataError(f"benchmark {name}: no question in it, name the split and the column that hold its questions")
    all_words, all_owners = np.array(numbers, dtype=np.int32), np.array(owners, dtype=np.int32)
    hashes, starts = _distinctive_ngrams(all_words, all_owners, n)
    return Benchmark(name, n, whole, vocabulary, all_words, all_owners, hashes, starts)


def question_of(messages: Iterable[Message]) -> str:
    """What the user says in a conversation: the text of all user turns, a line break between two."""
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


def whole_question(question: str) -> str:
    """The question's words and brackets run together; equal for questions that differ in typesetting only."""
    return _key(_tokens(question))


def ngram_words(question: str) -> list[str]:
    """The words that n-grams are made of: no brackets, no drawings."""
    return _words(_tokens(_DRAWING.sub(" ", question)))


# --- words ------------------------------------------------------------------------------------------------------------

_BRACKETS = frozenset("()[]")

_TOKEN = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?|(?<=\d)!|[+*/=<>|()\[\]-]")
"""A run of letters, a number, a factorial, or a sign that changes what a formula says."""

_DRAWING = re.compile(r"\[asy\].*?(?:\[/asy\]|\Z)", re.DOTALL)

_THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")

_LATEX_COMMA = re.compile(r"\{,\}|,\\!|\\!,")
"""How a comma in a number is written where TeX would set a space after it."""

_HYPHEN = re.compile(r"(?<=[^\W\d_]{2})-(?=[^\W\d_]{2})")
"""Between two words of two letters or more; elsewhere it is a minus."""

_TEXT_IN_FORMULA = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")

_SHORT_FRACTION = re.compile(r"\\([dt]?frac)\s*(\d)\s*(\d)")

_SMALL_GROUP = re.compile(r"\{\s*([^\W_]|\d+|\\[a-z]+)\s*\}")
"""Braces round one thing, which are as good as none."""

_COMMAND = re.compile(r"\\(?:([a-z]+)|(.))", re.DOTALL)

_LAYOUT = frozenset(
    ("left", "right", "big", "bigl", "bigr", "bigg", "biggl", "biggr", "quad", "qquad", "displaystyle", "textstyle")
)

_SYNONYMS = {"dfrac": "frac", "tfrac": "frac", "cdot": "*", "times": "*", "leq": "le", "geq": "ge", "neq": "ne"}

_SIGNS = str.maketrans(
    {"−": "-", "×": "*", "·": "*", "⋅": "*", "÷": " div ", "≤": " le ", "≥": " ge ", "≠": " ne ", "π": " pi "}
    | {"√": " sqrt ", "°": " circ ", "⁄": "/"}
)


def _tokens(text: str) -> list[str]:
    """Words and brackets in the normal form."""
    text = text.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).lower().translate(_SIGNS)
    latex = "\\" in text
    if latex:
        text = _TEXT_IN_FORMULA.sub(r" \1 ", text)
        text = _SHORT_FRACTION.sub(r"\\\1{\2}{\3}", text)
    if latex or "{" in text:
        text = _SMALL_GROUP.sub(r" \1 ", _LATEX_COMMA.sub(",", text))
    if latex:
        text = _COMMAND.sub(_command_as_text, text)
    if "-" in text:
        text = _HYPHEN.sub(" ", text)
    text = _THOUSANDS.sub("", text)
    return _TOKEN.findall(text.replace("%", " percent ").replace("{", "(").replace("}", ")"))


def _command_as_text(command: re.Match[str]) -> str:
    name = command[1]
    if name is None:  # one sign: \% and \{ mean it, \, and \( are space
        return command[2] if command[2] in "%{}" else " "
    return " " if name in _LAYOUT else f" {_SYNONYMS.get(name, name)} "


def _key(tokens: list[str]) -> str:
    """The tokens without the spaces between letters, so that ``x y`` is ``xy``, but 1 and 2 are not 12."""
    return "".join([token if token > "9" else f" {token}" for token in tokens])


def _words(tokens: list[str]) -> list[str]:
    return [token for token in tokens if token not in _BRACKETS]


# --- n-grams ----------------------------------------------------------------------------------------------------------

_FACTOR = 0x9E3779B97F4A7C15
"""Odd, so that multiplying by it modulo 2^64 loses nothing."""


@lru_cache
def _powers(bits: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The first 2^bits powers of ``_FACTOR`` modulo 2^64, and their inverses."""
    first = np.ones(1, dtype=np.uint64)
    factors = (_FACTOR, pow(_FACTOR, -1, 1 << 64))
    powers, inverses = (
        np.cumprod(np.concatenate([first, np.full((1 << bits) - 1, factor, dtype=np.uint64)])) for factor in factors
    )
    return powers, inverses


def _ngram_hashes(numbers: NDArray[np.int32], n: int) -> NDArray[np.uint64]:
    """[words] -> [words - n + 1], or empty: a polynomial in ``_FACTOR`` of each n words in a row, modulo 2^64."""
    count = max(0, len(numbers) - n + 1)
    if not count:
        return np.empty(0, dtype=np.uint64)
    powers, inverses = _powers(len(numbers).bit_length())
    sums = np.cumsum(numbers.astype(np.uint64) * powers[: len(numbers)])
    windows = sums[n - 1 :].copy()
    windows[1:] -= sums[: count - 1]
    return windows * inverses[:count]


def _distinctive_ngrams(
    words: NDArray[np.int32], owners: NDArray[np.int32], n: int
) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Hashes, ascending, and first places of the n-grams that lie in one question and are no stock phrase."""
    hashes = _ngram_hashes(words, n)
    inside = np.flatnonzero(owners[: len(hashes)] == owners[n - 1 :][: len(hashes)])
    order = inside[np.argsort(hashes[inside], kind="stable")]
    in_order, their_owners = hashes[order], owners[order]
    first = np.diff(in_order, prepend=~in_order[:1]) != 0
    another_question = first | (np.diff(their_owners, prepend=-1) != 0)
    begins = np.flatnonzero(first)
    questions = np.add.reduceat(another_question.astype(np.int64), begins) if len(begins) else begins
    kept = begins[questions <= SHARED_BY]
    return in_order[kept], order[kept].astype(np.int32)
