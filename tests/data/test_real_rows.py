"""Every real row is formatted, validated, rendered and verified, or counted out with its reason."""

import pytest

from numina_finetune.config import SourceConfig
from numina_finetune.data.chat import ChatOptions
from numina_finetune.data.dataset import build_index
from numina_finetune.data.prepare import IndexOptions

FILES = {
    "gsm8k/train.jsonl": (7473, {}),
    "gsm8k/test.jsonl": (1319, {}),
    "math/math_test.jsonl": (5000, {}),
    "math/math500_test.jsonl": (500, {}),
    "numina/numinamath_cot_rows.jsonl": (3, {}),
    "numina/numinamath_1.5_rows.jsonl": (0, {"proof": 1}),
    "numina/numinamath_tir_rows.jsonl": (1, {}),
    "tir/mathcoder_math_test_7b.jsonl": (379, {}),
    "tir/tora_corpus_examples_train.jsonl": (30, {}),
    "tir/tora_gsm8k_test_70b.jsonl": (601, {"output": 1}),
    "toolcalls/glaive_openai.jsonl": (154, {"does not fit the tool": 1}),
}
"""File -> rows kept, and a word of each reason with the rows dropped for it."""


@pytest.mark.parametrize("family", ["qwen3", "harmony"])
@pytest.mark.parametrize("name", FILES)
def test_rows_are_kept_with_a_verified_mask_or_counted_out(real_data, qwen3, gpt_oss, tmp_path, name, family):
    kept, dropped = FILES[name]
    tokenizer = qwen3 if family == "qwen3" else gpt_oss
    options = IndexOptions(max_seq_length=32768, chat=ChatOptions(family))
    sources = [SourceConfig(str(real_data / name))]
    if not kept:  # a source that gives nothing is an error of its own
        sources.append(SourceConfig(str(real_data / "gsm8k/test.jsonl")))
        with pytest.raises(Exception, match="proof"):
            build_index(sources, tokenizer, options, tmp_path)
        return
    (report,) = build_index(sources, tokenizer, options, tmp_path).report["sources"]
    assert report["kept"] == kept
    assert report["rows"] == kept + sum(dropped.values())
    assert len(report["dropped"]) == len(dropped)
    for word, count in dropped.items():
        (entry,) = (entry for reason, entry in report["dropped"].items() if word in reason)
        assert entry["count"] == count


@pytest.mark.parametrize("style", ["plain", "annotated", "calculator"])
def test_every_style_of_gsm8k_keeps_every_row(real_data, qwen3, tmp_path, style):
    options = IndexOptions(max_seq_length=32768, gsm8k_style=style)
    index = build_index([SourceConfig(str(real_data / "gsm8k/test.jsonl"))], qwen3, options, tmp_path)
    assert index.report["kept"] == 1319
    text = qwen3.decode(index.sample(0)[0])
    assert ("<<16-3-4=9>>" in text) == (style == "annotated")
    assert ('{"name": "calculator", "arguments": {"expression": "16-3-4"}}' in text) == (style == "calculator")


def test_tir_as_text_trains_on_the_code_and_not_on_its_output(real_data, qwen3, tmp_path):
    options = IndexOptions(max_seq_length=32768, tir_style="text")
    index = build_index([SourceConfig(str(real_data / "tir/tora_gsm8k_test_70b.jsonl"))], qwen3, options, tmp_path)
    ids, mask = index.sample(0)
    learned, given = qwen3.decode(ids[mask]), qwen3.decode(ids[~mask])
    assert "income = daily_income()\nprint(income)\n```\n```output\n" in learned
    assert learned.endswith("dollars every day at the farmers' market.<|im_end|>")
    assert "18\n```\n" in given and "18\n```" not in learned
