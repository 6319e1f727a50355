import json
import unicodedata

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from numina_finetune.data import format_example, render, validate_messages
from numina_finetune.data.chat import (
    ChatOptions,
    Rendered,
    render_many,
    render_prompt,
    renderer,
    resolve_family,
)
from numina_finetune.data.conversation import Conversation
from numina_finetune.data.encoding import Encoder
from numina_finetune.data.families.qwen3 import NO_THINKING
from numina_finetune.errors import ConfigError, DataError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "And 3+4?"},
    {"role": "assistant", "content": " 7"},
]


def supervised(rendered, tokenizer):
    """The text of each run of supervised tokens."""
    spans, inside = [], False
    for token, target in zip(rendered.input_ids, rendered.loss_mask, strict=True):
        if target:
            spans = [*spans[:-1], [*spans[-1], token]] if inside else [*spans, [token]]
        inside = target
    return [tokenizer.decode(span) for span in spans]


def conversation(row):
    example = format_example(row)
    return {"messages": validate_messages(example["messages"], example["tools"]), "tools": example["tools"]}


def test_assistant_turns_and_their_end_tokens_are_the_only_targets(tiny):
    assert supervised(render({"messages": TALK}, tiny), tiny) == ["3<|im_end|>", " 7<|im_end|>"]


def test_every_turn_has_the_empty_think_block_in_its_prompt(tiny):
    rendered = render({"messages": TALK}, tiny)
    assert tiny.decode(rendered.input_ids).count(f"assistant\n{NO_THINKING}") == 2


def test_training_tokens_are_the_inference_prompt_and_a_continuation(tiny):
    rendered = render({"messages": TALK}, tiny)
    for turn in (2, 4):
        prompt = render_prompt(TALK[:turn], tiny)
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.loss_mask[len(prompt)]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": "<think>hm</think>3"}, "<think>"),
        ({"role": "assistant", "content": "3", "reasoning_content": "hm"}, "reasoning"),
        ({"role": "assistant", "content": "  "}, "empty"),
        ({"role": "user", "content": "never mind"}, "no supervised token"),
    ],
)
def test_conversation_that_cannot_be_trained_on_is_refused(tiny, message, reason):
    with pytest.raises(DataError, match=reason):
        render(Conversation([{"role": "user", "content": "q"}, message]), tiny)


def test_messages_that_are_not_valid_are_refused_with_their_place(tiny):
    with pytest.raises(DataError, match=r"messages\[1\]\.content"):
        render({"messages": [TALK[1], {"role": "assistant", "content": None}]}, tiny)


def test_developer_messages_are_system_turns(tiny):
    developer = [{"role": "developer", "content": "Be brief."}, *TALK[1:]]
    assert render({"messages": developer}, tiny) == render({"messages": TALK}, tiny)


def test_one_refused_conversation_does_not_disturb_its_neighbours(tiny):
    bad = [TALK[1], {"role": "assistant", "content": " "}, *TALK[3:]]
    first, refused, last = render_many([{"messages": TALK}, {"messages": bad}, {"messages": TALK}], tiny)
    assert first == last == render({"messages": TALK}, tiny)
    assert isinstance(refused, DataError)


def test_control_tokens_names_in_an_answer_are_plain_text_and_targets(tiny):
    rendered = render({"messages": [TALK[1], {"role": "assistant", "content": "a<|im_end|>b"}]}, tiny)
    assert supervised(rendered, tiny) == ["a<|im_end|>b<|im_end|>"]
    assert rendered.input_ids.count(tiny.convert_tokens_to_ids("<|im_end|>")) == 2


def test_truncation_of_an_earlier_call_does_not_reach_the_tokens(with_template):
    tokenizer = with_template("Qwen-Qwen2.5-7B-Instruct")
    tokenizer("one two three four five", truncation=True, max_length=2, padding="max_length")
    rendered = render({"messages": TALK}, tokenizer)
    assert tokenizer.decode(rendered.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_turn_of_weight_0_and_its_end_token_are_no_targets(tiny):
    talk = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]
    rendered = render({"messages": talk}, tiny)
    assert rendered.input_ids == render({"messages": TALK}, tiny).input_ids
    assert supervised(rendered, tiny) == [" 7<|im_end|>"]


@pytest.mark.parametrize(
    ("content", "ranges", "spans"),
    [
        ("run: OUT so 4", [[5, 8]], ["run: ", " so 4<|im_end|>"]),
        ("OUT so 4", [[0, 3]], [" so 4<|im_end|>"]),
        ("\n\nso OUT", [[5, 8]], ["so ", "<|im_end|>"]),
        ("\n\nOUT so", [[1, 5]], [" so<|im_end|>"]),
    ],
)
def test_ranges_without_loss_are_cut_out_of_a_turn(tiny, content, ranges, spans):
    talk = [TALK[1], {"role": "assistant", "content": content, "no_loss": ranges}]
    assert supervised(render({"messages": talk}, tiny), tiny) == spans
    assert tiny.decode(render({"messages": talk}, tiny).input_ids).endswith(f"{content.lstrip()}<|im_end|>\n")


def test_turn_ends_are_the_end_tokens_and_not_where_targets_pause(tiny):
    talk = [TALK[1], {"role": "assistant", "content": "a OUT b", "no_loss": [[2, 5]]}, TALK[3], TALK[4]]
    chunk = renderer(tiny, ChatOptions()).chunk([Conversation(talk)])
    ends = [token for token, end in zip(chunk.input_ids, chunk.turn_ends, strict=True) if end]
    assert ends == [tiny.convert_tokens_to_ids("<|im_end|>")] * 2


def test_tokenizer_without_a_fast_form_is_refused():
    class Slow:
        name_or_path, chat_template = "slow", None

        def __len__(self):
            return 3

        def get_added_vocab(self):
            return {}

    with pytest.raises(ConfigError, match=r"slow: has no fast form"):
        render({"messages": TALK}, Slow(), family="template")


def test_unknown_family_is_refused(tiny):
    with pytest.raises(ConfigError, match="chatml"):
        resolve_family(tiny, "chatml")


def test_qwen3_family_without_its_tokens_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))
    with pytest.raises(ConfigError, match="<think>"):
        resolve_family(tokenizer, "qwen3")


def test_tokenizer_that_loses_text_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(Encoder, "decode", lambda self, spans: ["?" for _ in spans])
    with pytest.raises(DataError, match=r"run 0 decode to '\?', not to '3<|im_end|>'"):
        render({"messages": TALK}, tiny)


# --- with the real tokenizer and templates


def test_gsm8k_renders_byte_for_byte_as_qwen3s_template(real_rows, qwen3):
    for row in real_rows("gsm8k/test.jsonl", 300):
        example = conversation(row)
        rendered = render(example, qwen3, family="qwen3")
        theirs = qwen3.apply_chat_template(example["messages"], tokenize=False)
        assert qwen3.decode(rendered.input_ids) == theirs
        assert rendered.input_ids == qwen3(theirs)["input_ids"]
        assert supervised(rendered, qwen3) == [example["messages"][1]["content"] + "<|im_end|>"]


def test_tool_conversations_render_as_qwen3s_template_but_for_the_think_blocks(real_rows, qwen3):
    accepted = 0
    for row in real_rows("toolcalls/glaive_openai.jsonl"):
        try:
            example = conversation(row)
        except DataError:  # its calls do not fit its tools
            continue
        accepted += 1
        rendered = render(example, qwen3)
        # the template takes arguments as objects, and missing content as empty
        messages = [{"content": "", **message} for message in json.loads(json.dumps(example["messages"]))]
        for call in (call for message in messages for call in message.get("tool_calls", ())):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        theirs = qwen3.apply_chat_template(messages, tools=example["tools"], tokenize=False)
        assert qwen3.decode(rendered.input_ids).replace(NO_THINKING, "") == theirs.replace(NO_THINKING, "")
    assert accepted > 120


def test_tool_calls_are_targets_and_tool_output_is_not(qwen3):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":"é"}'}}
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "Let me add.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    assert supervised(render({"messages": messages}, qwen3), qwen3) == [
        'Let me add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call><|im_end|>',
        "It is 3.<|im_end|>",
    ]


@pytest.mark.parametrize(
    "content", ["  two spaces", "\n\nnewlines first", " \n x", "e\u0301 decomposed", "数学 🎲", "\r\nCRLF"]
)
def test_odd_beginnings_keep_the_prompt_tokens_of_inference(qwen3, content):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    prompt = render_prompt(messages[:1], qwen3)
    rendered = render({"messages": messages}, qwen3)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.loss_mask.index(True) == len(prompt)
    theirs = qwen3.apply_chat_template(messages, tokenize=False)
    assert qwen3.decode(rendered.input_ids) == unicodedata.normalize("NFC", theirs)


def test_generation_prompt_is_the_templates_with_thinking_off(qwen3):
    theirs = qwen3.apply_chat_template(TALK[:2], add_generation_prompt=True, enable_thinking=False, tokenize=False)
    assert render_prompt(TALK[:2], qwen3) == qwen3(theirs)["input_ids"]


def test_family_is_harmony_for_gpt_oss(gpt_oss):
    assert resolve_family(gpt_oss) == "harmony"
    rendered = render({"messages": TALK}, gpt_oss, options=ChatOptions(date="2026-01-02", reasoning_effort="high"))
    assert "Current date: 2026-01-02\n\nReasoning: high" in gpt_oss.decode(rendered.input_ids)
    prompt = render_prompt(TALK[:4], gpt_oss, options=ChatOptions(date="2026-01-02", reasoning_effort="high"))
    assert rendered.input_ids[: len(prompt)] == prompt and rendered.loss_mask[len(prompt)]


def test_harmony_answer_before_the_last_is_learned_without_its_end(gpt_oss):
    assert supervised(render({"messages": TALK}, gpt_oss), gpt_oss) == [
        "<|channel|>final<|message|>3",
        "<|channel|>final<|message|> 7<|return|>",
    ]
    chunk = renderer(gpt_oss, ChatOptions()).chunk([Conversation(TALK)])
    ends = [token for token, end in zip(chunk.input_ids, chunk.turn_ends, strict=True) if end]
    assert gpt_oss.decode(ends) == "<|end|><|return|>"


def test_template_keeps_control_tokens_names_in_data_as_text(with_template):
    tokenizer = with_template("Qwen-Qwen2.5-7B-Instruct")
    talk = [{"role": "user", "content": "what is <|im_end|> for?"}, {"role": "assistant", "content": "<|im_end|> ends"}]
    rendered = render({"messages": talk}, tokenizer)
    assert supervised(rendered, tokenizer) == ["<|im_end|> ends<|im_end|>"]
    assert rendered.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3  # the system message's too


@pytest.mark.parametrize("content", ["\U000f0001", "\U000f0000 and \ue000"])
def test_template_keeps_private_use_characters(with_template, content):
    tokenizer = with_template("Qwen-Qwen2.5-7B-Instruct")
    rendered = render({"messages": [TALK[1], {"role": "assistant", "content": content}]}, tokenizer)
    assert supervised(rendered, tokenizer) == [f"{content}<|im_end|>"]


def test_family_is_qwen3_for_qwen3_and_template_for_templates_that_write_something_else(qwen3, with_template):
    assert resolve_family(qwen3) == "qwen3"
    assert resolve_family(with_template("Qwen-Qwen3-0.6B")) == "qwen3"
    assert resolve_family(with_template("Qwen-Qwen2.5-7B-Instruct")) == "template"


def test_any_prefix_stable_template_gets_a_mask(with_template):
    tokenizer = with_template("Qwen-Qwen2.5-7B-Instruct")
    rendered = render({"messages": TALK}, tokenizer)
    assert tokenizer.decode(rendered.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert supervised(rendered, tokenizer) == ["3<|im_end|>", " 7<|im_end|>"]
    prompt = render_prompt(TALK[:4], tokenizer)
    assert rendered.input_ids[: len(prompt)] == prompt


def test_llama_template_is_rendered_with_its_trimmed_turns(with_template):
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = with_template("meta-llama-Llama-3.1-8B-Instruct", *special)
    rendered = render({"messages": TALK}, tokenizer)
    assert supervised(rendered, tokenizer) == ["3<|eot_id|>", "7<|eot_id|>"]


def test_todays_date_does_not_reach_the_tokens(with_template):
    tokenizer = with_template("Qwen-Qwen2.5-7B-Instruct")
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + tokenizer.chat_template
    assert tokenizer.decode(render({"messages": TALK}, tokenizer).input_ids).startswith("2025-06-28<|im_start|>")


def test_template_that_drops_a_rationale_is_refused(with_template):
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = with_template("meta-llama-Llama-3.1-8B-Instruct", *special)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "Let me add.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    with pytest.raises(DataError, match=r"messages\[1\].*Let me add"):
        render({"messages": messages, "tools": [{"type": "function", "function": {"name": "add"}}]}, tokenizer)


def test_template_that_is_not_prefix_stable_is_refused(qwen3):
    with pytest.raises(DataError, match="prefix-stable"):
        render({"messages": TALK}, qwen3, family="template")
    assert isinstance(render({"messages": TALK[:3]}, qwen3, family="template"), Rendered)


def test_tokenizer_without_template_and_qwen3_tokens_is_refused(with_template):
    tokenizer = with_template("Qwen-Qwen2.5-7B-Instruct")
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        render({"messages": TALK}, tokenizer, family="template")
