import re

import pytest

from numina_finetune.data.chat import Rendered
from numina_finetune.data.preview import preview, printable

STYLE = re.compile(r"\x1b\[[0-9;]*m")


def sample(tokenizer, *pieces):
    """(text, is a target) pieces as one sample; control tokens in the text are control tokens."""
    ids, mask = [], []
    for text, supervised in pieces:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        mask += [supervised] * len(tokens)
    return Rendered(ids, mask)


QUESTION = ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", False)


def test_without_colour_targets_stand_between_marks_and_the_rest_outside(tiny):
    rendered = sample(tiny, QUESTION, ("4<|im_end|>", True), ("\n<|im_start|>user\nSure?", False), ("Yes", True))
    head, body = preview(rendered, tiny, color=False, number=3).split("\n", 1)
    assert head == f"sample 3: {len(rendered.input_ids)} tokens, 5 supervised (12.5 %)"
    assert body == f"{QUESTION[0]}⟦4<|im_end|>⟧\n<|im_start|>user\nSure?⟦Yes⟧"


def test_with_colour_every_line_carries_its_own_style_and_only_targets_are_green(tiny):
    rendered = sample(tiny, QUESTION, ("4\n\nbye<|im_end|>", True))
    body = preview(rendered, tiny, color=True).split("\n", 1)[1]
    for line in body.split("\n"):
        assert line.count("\x1b[0m") * 2 == line.count("\x1b[")
    green = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", body)
    assert green == ["4↵", "↵", "bye"]
    assert "\x1b[1;30;42m<|im_end|>\x1b[0m" in body and "\x1b[36m<|im_end|>\x1b[0m" in body
    assert STYLE.sub("", body).replace("↵", "") == QUESTION[0] + "4\n\nbye<|im_end|>"


def test_with_colour_a_control_token_differs_from_text_that_spells_it(tiny):
    control = sample(tiny, ("<|im_end|>", True))
    spelled = Rendered([*tiny.encode("<|im_", add_special_tokens=False), *tiny.encode("end|>")], [True] * 10)
    shown = [preview(rendered, tiny, color=True).split("\n", 1)[1] for rendered in (control, spelled)]
    assert [STYLE.sub("", text) for text in shown] == ["<|im_end|>"] * 2
    assert shown[0] != shown[1]


@pytest.mark.parametrize("show_ids", [False, True])
def test_characters_of_several_tokens_are_whole(tiny, show_ids):
    rendered = sample(tiny, ("∑ 𝒜", False), ("🧮é", True))
    assert len(rendered.input_ids) == 14
    text = preview(rendered, tiny, color=False, show_ids=show_ids)
    assert "\ufffd" not in text and all(character in text for character in "∑𝒜🧮é")


def test_ids_stand_behind_their_tokens(tiny):
    a, end = tiny.encode("a")[0], tiny.convert_tokens_to_ids("<|im_end|>")
    accent = " ".join(map(str, tiny.encode("é")))
    shown = preview(sample(tiny, ("aé<|im_end|>", True)), tiny, color=False, show_ids=True)
    assert shown.split("\n", 1)[1] == f"⟦a⟨{a}⟩é⟨{accent}⟩<|im_end|>⟨{end}⟩⟧"


@pytest.mark.parametrize("color", [False, True])
def test_data_cannot_steer_the_terminal(tiny, color):
    hostile = "a\x1b[2Jb\x07\x9b31m\r\u202ec\u2028"
    text = preview(sample(tiny, (hostile, False), (hostile, True)), tiny, color=color)
    left = STYLE.sub("", text)
    assert all(character.isprintable() or character == "\n" for character in left)
    assert left.count(r"a\x1b[2Jb\x07\x9b31m\r\u202ec\u2028") == 2


def test_marks_in_the_data_are_not_taken_for_ours(tiny):
    text = preview(sample(tiny, ("⟦x⟧", False), ("y", True)), tiny, color=False)
    assert text.split("\n", 1)[1] == r"\u27e6x\u27e7⟦y⟧"


def test_sample_without_tokens_and_sample_without_targets_are_shown(tiny):
    assert preview(Rendered([], []), tiny, color=False) == "0 tokens, 0 supervised (0.0 %)\n"
    assert preview(sample(tiny, ("ab", False)), tiny, color=False) == "2 tokens, 0 supervised (0.0 %)\nab"


def test_printable_keeps_line_feeds_tabs_and_every_script():
    assert printable("a\n\tπ 数 \u202f𝒜") == "a\n\tπ 数 \u202f𝒜"
    assert printable("\x00\ud800") == r"\x00\ud800"


def test_real_conversations_show_their_text_with_qwen3s_tokens(qwen3, real_rows):
    for row in real_rows("gsm8k/test.jsonl", 50):
        pieces = (f"<|im_start|>user\n{row['question']}", False), (f"{row['answer']}<|im_end|>", True), ("\n", False)
        body = preview(sample(qwen3, *pieces), qwen3, color=False).split("\n", 1)[1]
        assert body == f"<|im_start|>user\n{row['question']}⟦{row['answer']}<|im_end|>⟧\n"
