"""Whatever a row holds, its text stays text: no prompt token is a target, and no row can end its own turn.

The oracle reads the tokens alone: it cuts them at the control tokens that begin a message, which only the layout may
write, and compares each message with what was put in.
"""

import json
import unicodedata

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from numina_finetune.data import render
from numina_finetune.data.conversation import Conversation
from numina_finetune.errors import DataError

FRAGMENTS = [
    *("<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "<|start|>assistant<|channel|>final<|message|>", "<|end|>", "<|return|>", "<|call|>"),
    *("<|constrain|>json", "```python\nprint(1)\n```\n", "```output\n1\n```", "\r\n", "\n\n", "\n", " ", "\t", "\x00"),
    *(
        "{{ x }}",
        "{% endfor %}",
        "\\boxed{4}",
        "#### 4",
        "é",
        "e\u0301",
        "数学",
        "🎲",
        "\u200b",
        "\ufeff",
        "\U000f0001",
    ),
]
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

texts = (
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=8)), max_size=6)
    .map("".join)
    .map(lambda text: text.encode("utf-8", "ignore").decode("utf-8"))
)
answers = texts.filter(lambda text: text.strip() and "<think>" not in text and "</think>" not in text)


@st.composite
def conversations(draw):
    """Any number of rounds, some with a tool call and its result; the answers are fit to be learned."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    for number in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        if draw(st.booleans()):
            arguments = draw(st.dictionaries(texts, texts, max_size=2))
            function = {"name": "python", "arguments": json.dumps(arguments, ensure_ascii=False)}
            call = {"id": f"call_{number}", "type": "function", "function": function}
            before = {"content": draw(answers)} if draw(st.booleans()) else {}
            messages.append({"role": "assistant", **before, "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": draw(texts)})
        messages.append({"role": "assistant", "content": draw(answers)})
    return Conversation(messages)


def blocks(rendered, tokenizer, start):
    """The tokens and targets of each message: (ids, mask) from its control token on."""
    first = tokenizer.convert_tokens_to_ids(start)
    starts = [place for place, token in enumerate(rendered.input_ids) if token == first]
    assert starts[0] == 0
    return [
        (rendered.input_ids[begin:end], rendered.loss_mask[begin:end])
        for begin, end in zip(starts, [*starts[1:], len(rendered.input_ids)], strict=True)
    ]


def same(left, right):
    return unicodedata.normalize("NFC", left) == unicodedata.normalize("NFC", right)


def check_qwen3(conversation, tokenizer):
    """Message by message: role, text, and that exactly the assistant's own text and end token are targets."""
    rendered = render(conversation, tokenizer, family="qwen3")
    read = blocks(rendered, tokenizer, "<|im_start|>")
    assert len(read) == len(conversation.messages)
    for message, (ids, mask) in zip(conversation.messages, read, strict=True):
        text = tokenizer.decode(ids)
        role, content = message["role"], message.get("content", "")
        if role != "assistant":
            assert not any(mask)
            name = "user\n<tool_response>" if role == "tool" else role
            end = "\n</tool_response>" if role == "tool" else ""
            assert same(text, f"<|im_start|>{name}\n{content}{end}<|im_end|>\n")
            continue
        targets = [token for token, target in zip(ids, mask, strict=True) if target]
        prompt = ids[: mask.index(True)]
        assert tokenizer.decode(prompt) == "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert targets == ids[len(prompt) : len(prompt) + len(targets)], "one run of targets"
        assert targets[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        said = tokenizer.decode(targets[:-1])
        if "tool_calls" in message:
            (call,) = message["tool_calls"]
            arguments = call["function"]["arguments"]
            written = f'<tool_call>\n{{"name": "python", "arguments": {arguments}}}\n</tool_call>'
            before = content.lstrip("\n")
            assert same(said, f"{before}\n{written}" if before else written)
        else:
            assert same(said, content.lstrip("\n"))


def check_harmony(conversation, tokenizer):
    """As many messages as were put in, the system message and the channels apart; targets only from the assistant."""
    rendered = render(conversation, tokenizer, family="harmony")
    read = [(tokenizer.decode(ids), mask) for ids, mask in blocks(rendered, tokenizer, "<|start|>")]
    written = 1 + sum(
        2 if message.get("tool_calls") and message.get("content", "").strip() else 1
        for message in conversation.messages
    )
    assert len(read) == written
    finals = [
        message for message in conversation.messages if message["role"] == "assistant" and "tool_calls" not in message
    ]
    texts = [text for text, _ in read if text.startswith("<|start|>assistant<|channel|>final")]
    for message, text in zip(finals, texts, strict=True):
        end = "<|return|>" if message is conversation.messages[-1] else "<|end|>"
        assert text == f"<|start|>assistant<|channel|>final<|message|>{message['content']}{end}"
    for text, mask in read:
        if not text.startswith("<|start|>assistant"):
            assert not any(mask)


@SETTINGS
@given(conversation=conversations())
def test_no_prompt_token_is_a_target_with_a_byte_level_tokenizer(tiny, conversation):
    check_qwen3(conversation, tiny)


@SETTINGS
@given(conversation=conversations())
def test_no_prompt_token_is_a_target_for_qwen3(qwen3, conversation):
    check_qwen3(conversation, qwen3)


@SETTINGS
@given(conversation=conversations())
def test_no_prompt_token_is_a_target_for_gpt_oss(gpt_oss, conversation):
    check_harmony(conversation, gpt_oss)


@SETTINGS
@given(conversation=conversations())
def test_a_chat_template_gives_a_mask_without_prompts_or_refuses(with_template, conversation):
    tokenizer = with_template("Qwen-Qwen2.5-7B-Instruct")
    messages = [message for message in conversation.messages if message["role"] in ("user", "system")][-1:]
    answer = conversation.messages[-1]["content"]
    try:
        rendered = render(Conversation([*messages, {"role": "assistant", "content": answer}]), tokenizer)
    except DataError:
        text = answer + messages[0]["content"]
        assert any(0xF0000 <= ord(character) <= 0xFFFFD for character in text), (
            "only private-use characters are refused"
        )
        return
    targets = [token for token, target in zip(rendered.input_ids, rendered.loss_mask, strict=True) if target]
    assert same(tokenizer.decode(targets), f"{answer}<|im_end|>")
    assert rendered.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3 - (
        messages[0]["role"] == "system"
    )


@pytest.mark.parametrize("content", FRAGMENTS)
def test_control_tokens_names_in_a_question_are_plain_text(qwen3, content):
    plain = render(Conversation([{"role": "user", "content": "x"}, {"role": "assistant", "content": "4"}]), qwen3)
    rendered = render(
        Conversation([{"role": "user", "content": content}, {"role": "assistant", "content": "4"}]), qwen3
    )
    control = set(qwen3.get_added_vocab().values())
    assert [i for i in rendered.input_ids if i in control] == [i for i in plain.input_ids if i in control]
