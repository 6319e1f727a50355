"""Real solutions run again in the sandbox print what was recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from numina_finetune.evaluation.sandbox import Minimum
from tests.evaluation.tiers import usable
from tests.evaluation.tir_rows import compare

FILES = ("mathcoder_math_test_7b", "tora_corpus_examples_train", "tora_gsm8k_test_70b")
AGREEING = ("same", "same error, told otherwise")


def run_again(rows: list[dict[str, Any]]) -> Counter[str]:
    """How many blocks are of each kind."""
    usable(Minimum.ISOLATED)
    with ThreadPoolExecutor(2) as pool:
        return Counter(block.kind for row in pool.map(compare, rows) for block in row)


def test_two_hundred_real_solutions_print_what_was_recorded(real_rows: Callable[..., list[dict[str, Any]]]) -> None:
    mathcoder = real_rows("tir/mathcoder_math_test_7b.jsonl")[::4]
    tora = real_rows("tir/tora_gsm8k_test_70b.jsonl")[::7]
    rows = [*mathcoder, *tora, *real_rows("tir/tora_corpus_examples_train.jsonl", 20)][:200]
    assert len(rows) == 200
    kinds = run_again(rows)
    assert kinds["same"] >= 0.94 * kinds.total(), kinds
    assert sum(kinds[kind] for kind in AGREEING) >= 0.985 * kinds.total(), kinds


@pytest.mark.slow
@pytest.mark.parametrize(("name", "differ"), zip(FILES, (5, 1, 0), strict=True))
def test_all_real_solutions_print_what_was_recorded(
    real_rows: Callable[..., list[dict[str, Any]]], name: str, differ: int
) -> None:
    """But for ``differ`` blocks, each explained in docs/sandbox.md."""
    kinds = run_again(real_rows(f"tir/{name}.jsonl"))
    assert kinds.total() - sum(kinds[kind] for kind in AGREEING) == differ, kinds
