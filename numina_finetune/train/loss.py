"""Next-token cross-entropy without ever holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from numina_finetune.data.loader import NO_LOSS
from numina_finetune.models.cache import CachePass
from numina_finetune.models.generation import next_logits

CHUNK_ELEMENTS = 2**26
"""Logits that a device holds at once: 256 MiB in fp32."""

CrossEntropy = Callable[[torch.Tensor, nn.Module, torch.Tensor], torch.Tensor]
"""``(hidden [batch, seq, hidden], head with a weight [vocabulary, hidden], labels [batch, seq])`` to a summed loss."""


class CausalLoss(nn.Module):
    """A causal language model and its summed loss, as the one module that is trained.

    A module rather than a function, because data-parallel wrappers hook the forward of a module.
    """

    def __init__(self, model: PreTrainedModel, cross_entropy: CrossEntropy | None = None) -> None:
        """
        Args:
            cross_entropy: another way to the loss than :func:`linear_cross_entropy`.
        """
        super().__init__()
        self.model = model
        self._cross_entropy = cross_entropy or _of_head

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        segment_ids: torch.Tensor,
        position_ids: torch.Tensor,
        supervised: torch.Tensor | None = None,
        **attended: Any,
    ) -> torch.Tensor:
        """The loss summed over supervised positions, fp32 scalar.

        Args:
            input_ids, labels, segment_ids, position_ids: ``[batch, seq]`` int32.
            supervised: ``[count]`` int64, the positions of ``batch x seq`` that have a loss, where the host knows them:
                no logits are made of the others.
            attended: what the model's attention asks for besides.
        """
        hidden = self.model.base_model(
            input_ids=input_ids, position_ids=position_ids, segment_ids=segment_ids, use_cache=False, **attended
        ).last_hidden_state
        if supervised is not None:
            hidden = hidden.flatten(0, 1).index_select(0, supervised).unsqueeze(0)
            labels = labels.flatten().index_select(0, supervised).unsqueeze(0)
        return self._cross_entropy(hidden, self.model.get_output_embeddings(), labels)

    def next_logits(self, ids: torch.Tensor, positions: torch.Tensor, cache: CachePass) -> torch.Tensor:
        """A `numina_finetune.models.generation.Forward` that this module's wrappers can hook as they do `forward`."""
        return next_logits(self.model, ids, positions, cache)


def _of_head(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, head.weight, labels)  # type: ignore[arg-type]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over tokens are made in: fp32, or more where the values themselves are."""
    return torch.promote_types(dtype, torch.float32)


def scaled(gradient: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``gradient`` times the scalar ``scale``, in ``dtype``.

    The product is made in the scalar's type. torch would round the scalar to the gradient's: 1/N in bf16 is off by up
    to 0.4 %, alike for every token of a step.
    """
    return (gradient.to(scale.dtype) * scale).to(dtype)


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of ``hidden @ weight.T`` against ``labels``, sum reduction.

    Args:
        hidden: ``[batch, seq, hidden]`` in the compute type.
        weight: ``[vocabulary, hidden]`` in the compute type.
        labels: ``[batch, seq]`` int, already shifted; ``-100`` has no loss.

    Returns:
        Scalar, fp32 unless the model computes in more.
    """
    batch, length, _ = hidden.shape
    chunk = max(1, min(length, CHUNK_ELEMENTS // (batch * weight.shape[0])))
    loss: torch.Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, chunk)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Walks the sequence in chunks and takes the gradients on the way forward.

    The loss is a sum, so its gradient is known up to one scalar when the logits are at hand: nothing is computed
    twice, and the weight's gradient is accumulated in one fp32 buffer. The chunks split the sequence, never the
    batch, so that rows stay on their devices.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk: int) -> torch.Tensor:
        wants_gradient, trains_weight = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]
        wide = accumulation_dtype(hidden.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_gradients = []
        weight_gradient = torch.zeros_like(weight, dtype=wide) if trains_weight else None
        for start in range(0, hidden.shape[1], chunk):
            states, targets = hidden[:, start : start + chunk], labels[:, start : start + chunk]
            chunk_loss, gradient = _chunk_loss((states @ weight.T).to(wide), targets)
            loss = loss + chunk_loss
            if wants_gradient:
                gradient = gradient.to(hidden.dtype)
                hidden_gradients.append(gradient @ weight)
            if weight_gradient is not None:
                weight_gradient = weight_gradient + torch.einsum("bsv,bsh->vh", gradient, states).to(wide)
        if wants_gradient:
            ctx.save_for_backward(torch.cat(hidden_gradients, dim=1), weight_gradient)
            ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        (scale,) = gradients
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return (
            scaled(hidden_gradient, scale, hidden_gradient.dtype),
            None if weight_gradient is None else scaled(weight_gradient, scale, ctx.weight_dtype),
            None,
            None,
        )


def _chunk_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss (scalar) and its gradient by the logits, ``[batch, chunk, vocabulary]``, in the logits' type."""
    supervised = (targets != NO_LOSS).unsqueeze(-1)
    log_probabilities = torch.log_softmax(logits, dim=-1)
    # Eager execution pays for each pass over the logits: the probabilities take the place of their logarithms.
    picked = targets.clamp(min=0).long().unsqueeze(-1)
    loss = -torch.where(supervised, log_probabilities.gather(-1, picked), 0.0).sum()
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(-1, picked, torch.full_like(picked, -1, dtype=gradient.dtype))
    return loss, gradient.mul_(supervised)
