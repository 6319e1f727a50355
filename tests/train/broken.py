"""A training in which something is not finite, in a process of its own: ``python -m tests.train.broken WHAT …options``.

WHAT is ``row:TEXT`` (the loss of each row whose tokens hold those of TEXT), ``loss:STEP`` (of every row from that
optimizer step on), or ``update:STEP`` (one weight, after that step). The loss is what the model's own module gives, and
the update what the optimizer makes: the rest of the run cannot tell such a fault from a real one.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch


def break_rows(text: str) -> None:
    """Make the loss of every row infinite whose tokens hold those of ``text``."""
    from transformers import AutoTokenizer

    from numina_finetune.models.builtin import TINY_TOKENIZER
    from numina_finetune.train.loss import CausalLoss

    tokens = AutoTokenizer.from_pretrained(TINY_TOKENIZER)(text, add_special_tokens=False)["input_ids"]
    sound = CausalLoss.forward

    def forward(self: Any, input_ids: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        windows = input_ids.unfold(1, len(tokens), 1)
        found = (windows == torch.tensor(tokens, device=input_ids.device)).all(-1).any()
        return sound(self, input_ids, **batch) * torch.where(found, torch.inf, 1.0)

    CausalLoss.forward = forward  # type: ignore[method-assign, assignment]


def break_loss(step: int) -> None:
    """Let every loss be no number from an optimizer step on, the evaluation's too."""
    from numina_finetune.train import trainer
    from numina_finetune.train.loss import CausalLoss

    sound, rate_at = CausalLoss.forward, trainer.learning_rate_at
    begun = False

    def learning_rate_at(done: int, *rest: Any) -> float:
        nonlocal begun
        begun = done + 1 >= step
        return rate_at(done, *rest)

    def forward(self: Any, *inputs: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        return sound(self, *inputs, **batch) * (torch.nan if begun else 1.0)

    trainer.learning_rate_at = learning_rate_at
    CausalLoss.forward = forward  # type: ignore[method-assign, assignment]


def break_update(step: int) -> None:
    """Let the update of one step, otherwise a sound one, make a weight that is no number."""
    from numina_finetune.train import step as arithmetic

    sound, made = arithmetic.guarded_update, 0

    def guarded_update(optimizer: Any, *rest: Any) -> None:
        nonlocal made
        made += 1
        sound(optimizer, *rest)
        if made == step:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].view(-1)[3] = torch.nan

    arithmetic.guarded_update = guarded_update


def break_training(what: str) -> None:
    """See the module's own description."""
    kind, _, value = what.partition(":")
    if kind == "row":
        break_rows(value)
    else:
        {"loss": break_loss, "update": break_update}[kind](int(value))


if __name__ == "__main__":
    from numina_finetune import launch
    from numina_finetune.cli.entry import main

    backend = "xla" if "PJRT_DEVICE" in os.environ else "native"
    launch.prepare_environment(backend)
    break_training(sys.argv.pop(1))
    sys.argv += ["--backend", backend]  # what was imported meanwhile hides who set the variable
    main()
