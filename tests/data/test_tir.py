import json
import re
import time
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numina_finetune.data import format_example, validate_messages
from numina_finetune.data.conversation import loss_runs
from numina_finetune.data.tir import PYTHON_TOOL, from_messages, output_ranges, parse, rebuild, to_messages
from numina_finetune.errors import DataError

REAL_FILES = [
    "tir/mathcoder_math_test_7b.jsonl",
    "tir/tora_corpus_examples_train.jsonl",
    "tir/tora_gsm8k_test_70b.jsonl",
    "numina/numinamath_tir_rows.jsonl",
]
RUN = "```python\n1+1\n```\n```output\n2\n```\n"
TEXT = "Add.\n" + RUN + "So \\boxed{2}."


def code_of(message):
    (call,) = message["tool_calls"]
    return json.loads(call["function"]["arguments"])["code"]


def row(solution):
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": solution}]
    return {"problem": "1+1?", "solution": solution, "messages": messages}


def test_code_becomes_a_python_call_and_its_output_the_answer():
    assert to_messages(TEXT) == [
        {
            "role": "assistant",
            "content": "Add.",
            "tool_calls": [
                {
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": "python", "arguments": '{"code": "1+1"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        {"role": "assistant", "content": "So \\boxed{2}."},
    ]


def test_rounds_are_numbered_and_code_without_prose_has_no_content():
    first, _, second, answer, final = to_messages(RUN + "Again.\n" + RUN + "Done.")
    assert "content" not in first and second["content"] == "Again."
    assert second["tool_calls"][0]["id"] == answer["tool_call_id"] == "call_2"
    assert final == {"role": "assistant", "content": "Done."}


def test_letters_outside_ascii_are_written_as_they_are():
    arguments = to_messages(TEXT.replace("1+1", "π = 3"))[0]["tool_calls"][0]["function"]["arguments"]
    assert arguments == '{"code": "π = 3"}'


def test_blocks_hold_the_exact_text():
    assert [(block.kind, block.text) for block in parse(TEXT)] == [
        ("prose", "Add.\n"),
        ("python", "```python\n1+1\n```\n"),
        ("output", "```output\n2\n```\n"),
        ("prose", "So \\boxed{2}."),
    ]


@pytest.mark.parametrize(
    ("text", "code", "output"),
    [
        (TEXT.replace("2\n```", "```"), "1+1", ""),
        (TEXT.replace("2\n```", "\n```"), "1+1", "\n"),
        (TEXT.replace("1+1", "a\n"), "a\n", "2"),
        (TEXT.replace("1+1\n", ""), "", "2"),
        (TEXT.replace("2\n", "Traceback (most recent call last):\nTimeoutError\n"), "1+1", None),
        (TEXT.replace("1+1", 's = """\n```\n"""'), 's = """\n```\n"""', "2"),
        (TEXT.replace("1+1", 's = """\n```latex\n```\n"""'), 's = """\n```latex\n```\n"""', "2"),
        (TEXT.replace("1+1", 'print("```")'), 'print("```")', "2"),
        (TEXT.replace("1+1", "    ```"), "    ```", "2"),
    ],
    ids=["no output", "a blank line", "code ends blank", "no code", "error", "fence", "fences", "inline", "indented"],
)
def test_unusual_blocks_are_converted_and_rebuild(text, code, output):
    call, answer, _ = messages = to_messages(text)
    assert code_of(call) == code
    assert output is None or answer["content"] == output
    assert from_messages(messages) == text


@pytest.mark.parametrize(
    "text",
    [
        "\nAdd.\n\n" + RUN + "\nSo 2.\n",
        "\n" + RUN + "Done.",
        RUN + "\n" + RUN + "\n\nDone.\n\n",
        "Some `code` and ```inline``` and\n```\na block\n```\n" + RUN + "Done.",
        "No code at all.\n",
        "```latex\nx\n```\n",
        "CRLF in prose.\r\n" + RUN + "Done.\r\n",
    ],
)
def test_white_space_and_other_fences_rebuild(text):
    assert from_messages(to_messages(text)) == text == rebuild(parse(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Add.\n```python\n1+1\n```\nSo 2.", "python block 1: no output block"),
        (TEXT + "\n```python\n2\n```", "python block 2: no output block"),
        ("```python\n1\n```\n" + RUN + "So 2.", "python block 1: no output block"),
        ("```python\n1\n```\nprints\n```output\n1\n```\nSo 1.", "python block 1: no output block"),
        ("```output\n2\n```\nSo 2.", "output block 1: no python block"),
        (RUN + "```output\n2\n```\nSo 2.", "output block 2: no python block"),
        (RUN, "no final answer"),
        (RUN + "\n \n", "no final answer"),
        ("```python\n1+1", "python block 1: its fence is never closed"),
        ("```python\n1+1\n```output\n2\n```\nSo 2.", "python block 1: its fence is never closed"),
        ("```python\n1\n```\n```output\n2", "output block 1: its fence is never closed"),
        (RUN + "So\n```\n2", "never closed"),
    ],
)
@pytest.mark.parametrize("style", ["tool_calls", "text"])
def test_broken_text_is_refused_with_its_reason(text, reason, style):
    with pytest.raises(DataError, match=re.escape(reason)):
        format_example(row(text), format="numina_tir", tir_style=style)


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("```python\n", "```python \n"),
        TEXT.replace("```\n```output", "```\n\n```output"),
        TEXT.replace("Add.\n", "Add."),
        TEXT.replace("Add.\n", "Add.\n  "),
    ],
    ids=["CRLF", "after a fence", "between code and output", "no newline before a fence", "before a fence"],
)
def test_white_space_that_messages_would_lose_is_refused_but_for_the_text_style(text):
    with pytest.raises(DataError, match="--tir-style text"):
        to_messages(text)
    _, turn = format_example(row(text), format="numina_tir", tir_style="text")["messages"]
    assert turn["content"] == text
    (masked,) = (run for run, is_target in loss_runs(turn) if not is_target)
    assert masked.split() == ["2", "```"]


def test_text_style_is_one_turn_whose_output_alone_is_out_of_the_loss():
    example = format_example(row(TEXT + "\n" + RUN + "Yes."), format="numina_tir", tir_style="text")
    assert example["tools"] is None
    turn = validate_messages(example["messages"], None)[1]
    assert loss_runs(turn) == [
        ("Add.\n```python\n1+1\n```\n```output\n", True),
        ("2\n```\n", False),
        ("So \\boxed{2}.\n```python\n1+1\n```\n```output\n", True),
        ("2\n```\n", False),
        ("Yes.", True),
    ]


@pytest.mark.parametrize("style", ["tool_calls", "text"])
def test_solution_without_code_is_a_plain_answer_without_tools(style):
    example = format_example(row("Two."), format="numina_tir", tir_style=style)
    assert example == {"messages": row("Two.")["messages"], "tools": None}


def test_unknown_style_is_refused():
    with pytest.raises(DataError, match="'calls' is unknown"):
        format_example(row(TEXT), format="numina_tir", tir_style="calls")


@pytest.mark.parametrize("part", ["```\n", "```python\n1\n```\n", RUN, "```", "\n", "```latex\n"])
def test_time_to_read_a_text_grows_with_its_length_only(part):
    """Read again from each fence, these would take minutes."""
    text = part * 30_000
    begin = time.perf_counter()
    with suppress(DataError):
        to_messages(text)
    assert time.perf_counter() - begin < 5


def test_messages_of_another_kind_cannot_be_converted_back():
    for messages in ([], [{"role": "user"}], to_messages(TEXT)[1:], [{"role": "assistant"}, *to_messages(TEXT)]):
        with pytest.raises(DataError, match="converted back"):
            from_messages(messages)


def test_conversation_with_its_tool_passes_validation():
    example = format_example(row(TEXT), format="numina_tir")
    assert example["tools"] == [PYTHON_TOOL]
    assert validate_messages(example["messages"], example["tools"]) == example["messages"]


@pytest.mark.parametrize("name", REAL_FILES)
def test_every_well_formed_real_row_is_accepted_valid_and_rebuilds(name, real_rows):
    outcomes = Counter()
    for real in real_rows(name):
        text = real["solution"]
        well_formed = text.count("```python\n") == text.count("```output\n") and not text.rstrip().endswith("```")
        try:
            example = format_example(real, format="numina_tir")
        except DataError:
            outcomes[well_formed, "refused"] += 1
            continue
        outcomes[well_formed, "accepted"] += 1
        user, *said = validate_messages(example["messages"], example["tools"])
        assert user["content"] == real["problem"]
        assert from_messages(said) == text
        assert [code_of(message) for message in said[:-1:2]] == re.findall(
            r"^```python\n(.*?)\n```\n```output$", text, re.DOTALL | re.MULTILINE
        )
    assert outcomes[True, "accepted"] >= 0.98 * (outcomes[True, "accepted"] + outcomes[True, "refused"])
    assert outcomes[False, "accepted"] == 0


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_rows_as_text_mask_what_the_interpreter_wrote_and_nothing_else(name, real_rows):
    masked_rows = 0
    for real in real_rows(name):
        text = real["solution"]
        try:
            ranges = output_ranges(text)
        except DataError:
            continue
        expected = [match.span(1) for match in re.finditer(r"^```output\n(.*?^```\n)", text, re.DOTALL | re.MULTILINE)]
        assert [tuple(pair) for pair in ranges] == expected
        masked_rows += bool(ranges)
    assert masked_rows > 0


PIECES = st.sampled_from(
    [
        *("```", "```python", "```output", "```latex", "\n", "\r\n", " ", "x", "π", '"', "\\", "So.", "\x00"),
        RUN,
        "\n```\n",
    ]
)
LINES = st.text(alphabet="ab \n\r\"'\\`π", max_size=12)


@given(st.lists(PIECES, max_size=16).map("".join))
def test_any_text_rebuilds_or_is_refused(text):
    try:
        messages = to_messages(text)
    except DataError:
        return
    assert from_messages(messages) == text == rebuild(parse(text))


@given(st.lists(st.tuples(LINES, LINES, LINES), max_size=4), LINES)
def test_texts_of_rounds_are_accepted_whatever_their_parts_say(rounds, final):
    """Newlines anywhere, empty parts: only a ``` fence or a blank end makes a text unfit."""
    parts = [(f"{prose}\n" if prose else "", code, output) for prose, code, output in rounds]
    text = "".join(f"{p}```python\n{c}\n```\n```output\n{o}\n```\n" for p, c, o in parts) + final
    if "```" in final or any("```" in part for each in parts for part in each):
        return
    if rounds and not final.strip():
        with pytest.raises(DataError, match="no final answer"):
            to_messages(text)
        return
    messages = to_messages(text)
    assert len(messages) == 2 * len(rounds) + 1
    assert from_messages(messages) == text
