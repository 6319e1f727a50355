"""Conversation -> token ids and loss mask; the mask is derived, then verified.

A conversation becomes segments of text, prompt and answer in turn, and each segment is tokenised alone, so that
training sees the very tokens of inference: the prompt's ids, then a continuation::

    <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n | 4<|im_end|> | \\n
    0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 | 1 1 1     | 0

The mask is then checked against the conversation: the supervised tokens, decoded, must be each assistant turn's text
and its end token, and nothing else.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from numina_finetune.data.conversation import Conversation, Message
from numina_finetune.data.tool_calls import validate_messages, without_none
from numina_finetune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAMILIES = ("auto", "qwen3", "template")

NO_THINKING = "<think>\n\n</think>\n\n"
"""What Qwen3's generation prompt ends with where thinking is off."""

TEMPLATE_DATE = date(2024, 7, 26)
"""What chat templates write for today's date: with the real one, tokens would change at midnight."""

_QWEN3_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")


@dataclass(frozen=True)
class Rendered:
    """One training sample."""

    input_ids: list[int]
    loss_mask: list[bool]
    """True where the token is a target; as long as ``input_ids``."""


@dataclass(frozen=True)
class Segment:
    """Text that is tokenised alone; an assistant turn with its end token where ``supervised``."""

    text: str
    supervised: bool


def render(
    conversation: Conversation | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, family: str = "auto"
) -> Rendered:
    """One conversation as token ids with a verified loss mask.

    Args:
        conversation: a Conversation, whose messages passed ``validate_messages``; or a mapping with ``messages``
            and ``tools``, which is validated here.
        tokenizer: the model's own.
        family: ``qwen3``, ``template`` (the tokenizer's chat template), or ``auto``.

    Raises:
        DataError: the conversation cannot be rendered, or its mask did not pass the check.
    """
    rendered = render_many([conversation], tokenizer, family=family)[0]
    if isinstance(rendered, DataError):
        raise rendered
    return rendered


def render_many(
    conversations: Sequence[Conversation | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    family: str = "auto",
) -> list[Rendered | DataError]:
    """Like :func:`render` for many at once (tokenised in one call), with the error in place of what was refused."""
    family = resolve_family(tokenizer, family)
    talks = [_validated(conversation) for conversation in conversations]
    plans = [_segments_or_error(talk, tokenizer, family) for talk in talks]
    texts = [segment.text for plan in plans if not isinstance(plan, DataError) for segment in plan]
    encoded = iter(_encode(texts, tokenizer))
    results: list[Rendered | DataError] = []
    for plan in plans:
        if isinstance(plan, DataError):
            results.append(plan)
            continue
        ids, mask = [], []
        for segment in plan:
            tokens = next(encoded)
            ids += tokens
            mask += [segment.supervised] * len(tokens)
        results.append(Rendered(ids, mask))
    return _verified(talks, results, tokenizer, family)


def render_prompt(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: list[dict[str, Any]] | None = None,
    family: str = "auto",
) -> list[int]:
    """The ids after which the model generates the next assistant turn, as it was trained to.

    Raises:
        DataError: the messages cannot be rendered.
    """
    talk = Conversation([without_none(message) for message in messages], without_none(tools) or None)
    _refuse_control_tokens(talk, tokenizer)
    if resolve_family(tokenizer, family) == "template":
        return _encode([_apply_template(talk, tokenizer, len(talk.messages), prompt=True)], tokenizer)[0]
    segments = [*_qwen3_segments(talk), Segment(f"<|im_start|>assistant\n{NO_THINKING}", False)]
    return [token for ids in _encode([segment.text for segment in _merged(segments)], tokenizer) for token in ids]


def resolve_family(tokenizer: PreTrainedTokenizerBase, family: str = "auto") -> str:
    """``qwen3`` or ``template``.

    ``auto`` is qwen3 where the tokenizer has Qwen3's tokens and its own template, if it has one, writes what ours
    does: other models share these tokens but not the layout.

    Raises:
        ConfigError: the family is unknown, or the tokenizer lacks its tokens.
    """
    if family not in FAMILIES:
        raise ConfigError(f"chat family {family!r} is unknown: use one of {', '.join(FAMILIES)}")
    if family == "template":
        return family
    missing = [token for token in _QWEN3_TOKENS if not _is_one_token(token, tokenizer)]
    if family == "qwen3":
        if missing:
            raise ConfigError(f"chat family qwen3: the tokenizer has no token {', '.join(missing)}")
        return family
    return "template" if missing or not _template_agrees(tokenizer) else "qwen3"


# --- Qwen3 ------------------------------------------------------------------------------------------------------------

_QWEN3_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{signatures}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def _qwen3_segments(conversation: Conversation) -> list[Segment]:
    """Qwen3's layout, with the empty think block before every assistant turn.

    The model's own template writes it before the last turn only, so that earlier turns would be trained on prompts
    that inference never shows (thinking off prefills it each time).
    """
    messages = conversation.messages
    segments = [Segment(_qwen3_system(conversation), False)]
    for position, message in enumerate(messages):
        role = message["role"]
        if role == "assistant":
            segments += [
                Segment(f"<|im_start|>assistant\n{NO_THINKING}", False),
                Segment(_qwen3_turn(message), True),
                Segment("\n", False),
            ]
        elif role == "tool":
            first = position == 0 or messages[position - 1]["role"] != "tool"
            last = position == len(messages) - 1 or messages[position + 1]["role"] != "tool"
            response = f"\n<tool_response>\n{message['content']}\n</tool_response>"
            opening, closing = "<|im_start|>user" if first else "", "<|im_end|>\n" if last else ""
            segments.append(Segment(opening + response + closing, False))
        elif role == "user" or position > 0:
            name = "system" if role == "developer" else role
            segments.append(Segment(f"<|im_start|>{name}\n{message['content']}<|im_end|>\n", False))
    return segments


def _qwen3_system(conversation: Conversation) -> str:
    """The opening system turn with the tools' signatures; empty where there is neither."""
    first = conversation.messages[0] if conversation.messages else {"role": ""}
    parts = [first["content"]] if first["role"] in ("system", "developer") else []
    if conversation.tools:
        parts.append(_QWEN3_TOOLS.format(signatures="".join("\n" + _json(tool) for tool in conversation.tools)))
    text = "\n\n".join(parts)
    return f"<|im_start|>system\n{text}<|im_end|>\n" if parts else ""


def _qwen3_turn(message: Message) -> str:
    """What the model is to write in this turn, end token included."""
    # The prompt ends in newlines; the template drops those that the content begins with.
    parts = [message.get("content", "").lstrip("\n")]
    for call in message.get("tool_calls", ()):
        name, arguments = call["function"]["name"], _json(json.loads(call["function"]["arguments"]))
        parts.append(f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>')
    return "\n".join(part for part in parts if part) + "<|im_end|>"


def _template_agrees(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's own template, if any, writes what our Qwen3 renderer writes."""
    if not tokenizer.chat_template:
        return True
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    probe = Conversation(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a", "tool_calls": [call]},
        ],
        [tool],
    )
    try:
        theirs = _apply_template(probe, tokenizer, len(probe.messages))
    except DataError:
        return False
    return theirs == "".join(segment.text for segment in _qwen3_segments(probe))


# --- any chat template ------------------------------------------------------------------------------------------------


def _template_segments(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The template's text, cut where each generation prompt and each assistant turn ends.

    Raises:
        DataError: the template renders a conversation and its beginnings differently (so that training would see
            prompts that inference never shows), or writes no end token.
    """
    full = _apply_template(conversation, tokenizer, len(conversation.messages))
    segments: list[Segment] = []
    done = 0
    for position, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply_template(conversation, tokenizer, position, prompt=True)
        through = _apply_template(conversation, tokenizer, position + 1)
        turn = _through_end_token(through[len(prompt) :], tokenizer) if through.startswith(prompt) else None
        if turn is None or not full.startswith(prompt + turn):
            raise DataError(
                f"messages[{position}]: the chat template renders this turn differently once more follows (it is not "
                "prefix-stable), so its loss mask cannot be derived"
            )
        segments += [Segment(full[done : len(prompt)], False), Segment(turn, True)]
        done = len(prompt) + len(turn)
    return [*segments, Segment(full[done:], False)]


def _through_end_token(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """``text`` up to its last special token, after which only white space may stand."""
    ends = [match.end() for match in _special_tokens(tokenizer).finditer(text)]
    if not ends or text[ends[-1] :].strip():
        raise DataError("the chat template ends an assistant turn without an end token")
    return text[: ends[-1]]


def _apply_template(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, count: int, prompt: bool = False
) -> str:
    """The tokenizer's own text of the first ``count`` messages."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template, and no family of ours fits it")
    try:
        text = tokenizer.apply_chat_template(
            [_for_template(message) for message in conversation.messages[:count]],
            tools=list(conversation.tools or ()) or None,
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=_with_pinned_date(tokenizer.get_chat_template(tools=conversation.tools)),
            enable_thinking=False,
        )
    except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from error
    return str(text)


def _with_pinned_date(template: str) -> str:
    """The template with its calls of ``strftime_now("%Y-%m-%d")`` replaced by ``TEMPLATE_DATE``."""
    call = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
    return call.sub(lambda match: f'"{TEMPLATE_DATE.strftime(match[2])}"', template)


def _for_template(message: Message) -> Message:
    """The message as templates expect it: arguments as objects (some encode text twice), content never missing."""
    message = {**message, "content": message.get("content", "")}
    if message["role"] == "developer":  # templates drop a role that they do not know without a word
        message["role"] = "system"
    if "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return message


# --- verification -----------------------------------------------------------------------------------------------------


def _verified(
    conversations: list[Conversation | DataError],
    results: list[Rendered | DataError],
    tokenizer: PreTrainedTokenizerBase,
    family: str,
) -> list[Rendered | DataError]:
    """``results``, with a DataError where the supervised tokens do not spell the assistant turns."""
    spans = [[] if isinstance(result, DataError) else _supervised_spans(result) for result in results]
    decoded = iter(_decode([span for each in spans for span in each], tokenizer))
    verified: list[Rendered | DataError] = []
    for conversation, result, each in zip(conversations, results, spans, strict=True):
        texts = [next(decoded) for _ in each]
        if isinstance(conversation, DataError) or isinstance(result, DataError):
            verified.append(result)
            continue
        faults = _mask_faults(conversation, texts, tokenizer, family)
        verified.append(DataError(faults) if faults else result)
    return verified


def _supervised_spans(rendered: Rendered) -> list[list[int]]:
    """The ids of each run of supervised tokens."""
    spans: list[list[int]] = []
    before = False
    for token, supervised in zip(rendered.input_ids, rendered.loss_mask, strict=True):
        if supervised and not before:
            spans.append([])
        if supervised:
            spans[-1].append(token)
        before = supervised
    return spans


def _mask_faults(
    conversation: Conversation, decoded: list[str], tokenizer: PreTrainedTokenizerBase, family: str
) -> list[str]:
    turns = [
        (position, message) for position, message in enumerate(conversation.messages) if message["role"] == "assistant"
    ]
    if not decoded:
        return ["the conversation has no supervised token"]
    if len(decoded) != len(turns):
        return [f"the loss mask has {len(decoded)} supervised spans for {len(turns)} assistant messages"]
    faults = []
    for (position, message), text in zip(turns, decoded, strict=True):
        said = _says_qwen3(message, text) if family == "qwen3" else _says(message, text, tokenizer)
        if not said:
            faults.append(
                f"messages[{position}]: the supervised tokens decode to {_shortened(text)!r}, "
                f"which is not this turn, {_shortened(message.get('content', ''))!r}, and its end token"
            )
    return faults


def _says_qwen3(message: Message, text: str) -> bool:
    return _same_text(text, _qwen3_turn(message))


def _says(message: Message, text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template's turn ends in a special token and says the message, whole and, without calls, alone.

    Templates may trim the content. How they write tool calls is theirs, but every name and argument must be there.
    """
    body = _special_tokens(tokenizer).sub("", text)
    ends = text.endswith(tuple(tokenizer.all_special_tokens))
    content = message.get("content", "").strip()
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if not calls:
        return ends and _same_text(body.strip(), content)
    keys = [key for call in calls for key in json.loads(call["arguments"])]
    words = [content, *(call["name"] for call in calls), *keys]
    return ends and all(_normal(word) in _normal(body) for word in words)


def _same_text(left: str, right: str) -> bool:
    return _normal(left) == _normal(right)


def _normal(text: str) -> str:
    """Tokenizers may normalise (Qwen's to NFC), so equal means equal after that."""
    return unicodedata.normalize("NFC", text)


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:60]} … {text[-50:]}"


# --- shared -----------------------------------------------------------------------------------------------------------


def _segments_or_error(
    conversation: Conversation | DataError, tokenizer: PreTrainedTokenizerBase, family: str
) -> list[Segment] | DataError:
    if isinstance(conversation, DataError):
        return conversation
    try:
        _refuse_control_tokens(conversation, tokenizer)
        _refuse_unteachable(conversation)
        if family == "qwen3":
            return _merged(_qwen3_segments(conversation))
        return _merged(_template_segments(conversation, tokenizer))
    except DataError as error:
        return error


def _refuse_control_tokens(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> None:
    """Text that spells a special token would become one, and end or begin a turn where there is none."""
    special = _special_tokens(tokenizer)
    if match := special.search(_json(conversation.tools)):
        raise DataError(f"tools: the text holds the special token {match.group()!r}")
    for position, message in enumerate(conversation.messages):
        texts = [message.get("content", "")]
        texts += [call["function"]["arguments"] for call in message.get("tool_calls", ())]
        for text in texts:
            if match := special.search(text):
                raise DataError(f"messages[{position}]: the text holds the special token {match.group()!r}")


def _refuse_unteachable(conversation: Conversation) -> None:
    """Reasoning has no place in prompts with thinking off, and an empty turn teaches silence."""
    for position, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        content = message.get("content", "")
        if not content.strip() and not message.get("tool_calls"):
            raise DataError(f"messages[{position}].content: is empty, so there is nothing to learn")
        if message.get("reasoning_content") or message.get("reasoning") or message.get("thinking"):
            raise DataError(f"messages[{position}]: has separate reasoning, which is not trained on: put it in content")
        if "<think>" in content or "</think>" in content:
            raise DataError(f"messages[{position}].content: holds <think> tags, but thinking is off in every prompt")


def _validated(conversation: Conversation | Mapping[str, Any]) -> Conversation | DataError:
    if isinstance(conversation, Conversation):
        return conversation
    try:
        messages = validate_messages(conversation.get("messages"), conversation.get("tools"))
    except DataError as error:
        return error
    return Conversation(messages, without_none(conversation.get("tools")) or None)


def _merged(segments: list[Segment]) -> list[Segment]:
    """Neighbouring prompt segments joined (one text, one tokenisation) and empty ones dropped."""
    merged: list[Segment] = []
    for segment in segments:
        if not segment.text:
            continue
        if merged and not segment.supervised and not merged[-1].supervised:
            segment = Segment(merged.pop().text + segment.text, False)
        merged.append(segment)
    return merged


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return list(encoded["input_ids"])


def _decode(spans: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if not spans:
        return []
    return list(tokenizer.batch_decode(spans, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _is_one_token(token: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return len(_encode([token], tokenizer)[0]) == 1


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any special token; nothing where there are none."""
    tokens = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _json(value: Any) -> str:
    """As ``tojson`` writes it in chat templates."""
    return json.dumps(value, ensure_ascii=False)
