"""What a model is asked, in a chat as in training or as plain text, and what of its tokens is its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from numina_finetune.data.chat import ChatOptions, render_prompt, resolve_family
from numina_finetune.data.conversation import Conversation, Message
from numina_finetune.evaluation.tasks import Problem

KINDS = ("chat", "completion", "raw")
NEXT_QUESTION = "Question:"
"""Where a completion goes on to a question of its own, as the harness ends it (``lm_eval/tasks/gsm8k/gsm8k.yaml``)."""
_SEEN_TOKENS = 64
"""The newest tokens, in which the text that ends a completion is looked for: more than come between two looks."""
_TURN_ENDS = {"qwen3": ("<|im_end|>",), "harmony": ("<|return|>", "<|call|>"), "template": ()}
"""What ends the model's turn, besides what the tokenizer and the generation settings name."""
_MESSAGE = "<|message|>"
"""Begins a message's content in Harmony, of which a turn may have several."""


@dataclass(frozen=True)
class PromptOptions:
    """How problems are put."""

    kind: str = "chat"
    """One of ``KINDS``."""
    instruction: str | None = None
    """Behind every question of a chat; before everything in a completion."""
    system_prompt: str | None = None
    chat: ChatOptions = field(default_factory=ChatOptions)


class Prompts:
    """The prompts of one task for one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: PromptOptions,
        examples: Sequence[Problem] = (),
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        """
        Args:
            examples: solved ones, as earlier turns of the chat or as text.
            tools: that the model may call, in a chat.
        """
        self.tokenizer, self.options, self._examples, self._tools = tokenizer, options, list(examples), tools
        self._family = resolve_family(tokenizer, options.chat.family)

    def conversation(self, question: str) -> Conversation:
        """The chat up to the question."""
        system, instruction = self.options.system_prompt, self.options.instruction
        messages: list[Message] = [{"role": "system", "content": system}] if system else []

        def asked(text: str) -> Message:
            return {"role": "user", "content": f"{text}\n\n{instruction}" if instruction else text}

        for example in self._examples:
            messages += [asked(example.question), {"role": "assistant", "content": example.solution}]
        return Conversation([*messages, asked(question)], self._tools)

    def ids(self, question: str) -> list[int]:
        """The tokens after which the model answers.

        Raises:
            DataError: the chat layout has no place for something in the conversation.
        """
        if self.options.kind == "chat":
            chat = self.conversation(question)
            return self.chat_ids(chat)
        if self.options.kind == "raw":
            return [int(token) for token in self.tokenizer(question)["input_ids"]]
        parts = [self.options.instruction] if self.options.instruction else []
        parts += [f"{NEXT_QUESTION} {example.question}\nAnswer: {example.solution}" for example in self._examples]
        text = "\n\n".join([*parts, f"{NEXT_QUESTION} {question}\nAnswer:"])
        return [int(token) for token in self.tokenizer(text)["input_ids"]]

    def chat_ids(self, chat: Conversation) -> list[int]:
        """The tokens after which the model answers in a chat.

        Raises:
            DataError: the chat layout has no place for something in it.
        """
        return render_prompt(chat.messages, self.tokenizer, tools=chat.tools, options=self.options.chat)

    def stop_ids(self, generation: GenerationConfig) -> frozenset[int]:
        """The tokens that end an answer: the tokenizer's, the generation settings', and the chat layout's own."""
        configured = generation.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        known = self.tokenizer.get_added_vocab()
        ends = [known[name] for name in _TURN_ENDS[self._family] if name in known]
        return frozenset(int(token) for token in [*ids, self.tokenizer.eos_token_id, *ends] if token is not None)

    def ended(self, tokens: list[int]) -> bool:
        """Whether an answer has ended that no stop token ended: a completion that asks the next question."""
        if self.options.kind != "completion":
            return False
        return NEXT_QUESTION in self.tokenizer.decode(tokens[-_SEEN_TOKENS:], skip_special_tokens=True)

    def text(self, tokens: Sequence[int]) -> str:
        """The answer that new tokens are: of Harmony's messages the last one, of a completion what it is asked for."""
        if self.options.kind == "raw":
            return self._decoded(tokens)
        if self.options.kind == "completion":
            return self._decoded(tokens).partition(NEXT_QUESTION)[0].strip()
        if self._family == "harmony":
            message = self.tokenizer.get_added_vocab()[_MESSAGE]
            start = max((place + 1 for place, token in enumerate(tokens) if token == message), default=0)
            tokens = tokens[start:]
        return self._decoded(tokens).strip()

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
