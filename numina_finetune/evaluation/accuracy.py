"""How often a model's greedy answer is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from numina_finetune.evaluation.answers import Style, answers_match, extract_answer, majority_baseline
from numina_finetune.evaluation.generation import generate_greedy
from numina_finetune.evaluation.intervals import wilson_interval


@dataclass(frozen=True)
class AccuracyReport:
    """Exact match over a set of problems."""

    n: int
    correct: int
    accuracy: float
    lower: float
    """Lower end of Wilson's 95% interval."""
    upper: float
    """Upper end of Wilson's 95% interval."""
    majority: float
    """Accuracy of always giving the most frequent answer."""
    invalid: int
    """Completions in which no answer was found; they count as wrong."""

    @property
    def summary(self) -> str:
        """The figures as one line."""
        return (
            f"{self.correct}/{self.n} = {self.accuracy:.1%} (95% {self.lower:.1%} to {self.upper:.1%}; "
            f"majority answer {self.majority:.1%}; {self.invalid} without an answer)"
        )


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Mapping[str, str]],
    *,
    prompt_ids: Callable[[str], list[int]],
    batch_size: int,
    max_new_tokens: int,
    style: Style = "gsm8k",
) -> AccuracyReport:
    """Greedy exact match on rows ``{"question", "answer"}``.

    Args:
        prompt_ids: a question's tokens up to where the answer begins, exactly as training saw them.
        batch_size: rows decoded together.
        max_new_tokens: where an answer that does not end is cut.
        style: how the answer is read from a gold solution and from a completion (see :mod:`.answers`).
    """
    completions = generate_greedy(
        model,
        [prompt_ids(problem["question"]) for problem in problems],
        max_new_tokens=max_new_tokens,
        eos_ids=end_ids(model, tokenizer),
        pad_id=pad_id(tokenizer),
        batch_size=batch_size,
    )
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completions]
    return score([problem["answer"] for problem in problems], texts, style=style)


def score(solutions: Sequence[str], completions: Sequence[str], *, style: Style = "gsm8k") -> AccuracyReport:
    """Compare the answers of gold solutions and completions, pair by pair."""
    golds = [extract_answer(solution, style=style) for solution in solutions]
    answers = [extract_answer(completion, style=style) for completion in completions]
    n = len(golds)
    correct = sum(answers_match(gold, answer) for gold, answer in zip(golds, answers, strict=True))
    lower, upper = wilson_interval(correct, n)
    return AccuracyReport(
        n=n,
        correct=correct,
        accuracy=correct / n if n else 0.0,
        lower=lower,
        upper=upper,
        majority=majority_baseline([gold for gold in golds if gold is not None]),
        invalid=sum(answer is None for answer in answers),
    )


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a turn: the tokenizer's own, and those that the model's generation settings name."""
    settings = model.generation_config
    configured = settings.eos_token_id if settings is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return {int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills a batch: any will do, for padding is never attended to."""
    return int(tokenizer.pad_token_id or 0)
