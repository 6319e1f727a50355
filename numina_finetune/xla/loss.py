"""The loss in chunks, as loops of the XLA program; see `numina_finetune.train.loss`.

Two ways to cut the logits ``[tokens, vocabulary]``, of which neither ever holds them whole:

- by **sequence**: each chunk's gradients are taken when its logits are at hand, so that nothing is computed twice. The
  head's weight is gathered once, and its gradient grows in a buffer of its size on every chip.
- by **vocabulary**: the weight is gathered block by block, and a block's gradient leaves at once. First a pass for the
  sums that softmax divides by, then one back for the gradients, which makes the logits a second time, but for those of
  the block at which it turns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from numina_finetune.data.loader import NO_LOSS
from numina_finetune.models.precision import contracted
from numina_finetune.train.loss import accumulation_dtype, scaled
from numina_finetune.xla.constraints import Constraints, computed
from numina_finetune.xla.loops import Loop, Tensors
from numina_finetune.xla.sharding import PartitionSpec
from numina_finetune.xla.weights import master_of

CHUNK_ELEMENTS = 2**28
"""Logits that a chip holds at once, at most: 1 GiB in fp32, half a GiB in bf16."""
LARGEST_GRADIENT = 2**31
"""Bytes that the head's gathered weight and its gradient may take on a chip before ``auto`` goes by vocabulary."""

Gradients = tuple[torch.Tensor, torch.Tensor | None]
"""By the hidden states and by the head's weight, where that is trained."""


def cross_entropy_for(
    way: str, spec: PartitionSpec, weight: torch.Tensor, dtype: torch.dtype, constraints: Constraints
) -> ChunkedCrossEntropy:
    """What ``--loss-chunks`` comes to for a head of this weight.

    Args:
        way: ``auto``, ``sequence`` or ``vocabulary``.
        spec: partition of the weight.
        dtype: what the product with it is computed in.
    """
    own = weight.numel() // constraints.shape.tensor
    large = own * (dtype.itemsize + accumulation_dtype(dtype).itemsize) > LARGEST_GRADIENT
    divides = weight.shape[0] % (64 * constraints.shape.tensor) == 0  # else its blocks might be few tokens each
    by_vocabulary = way == "vocabulary" or (way == "auto" and large and divides)
    return (ByVocabulary if by_vocabulary else BySequence)(spec, dtype, constraints)


class ChunkedCrossEntropy(ABC):
    """A :data:`~numina_finetune.train.loss.CrossEntropy` whose gradients are taken on the way forward."""

    def __init__(
        self,
        spec: PartitionSpec,
        dtype: torch.dtype,
        constraints: Constraints,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        self._spec, self._dtype, self._constraints = spec, dtype, constraints
        self._chunk_elements = chunk_elements

    def __call__(self, hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = _Loss.apply(self, hidden, master_of(head, "weight"), labels)  # type: ignore[no-untyped-call]
        return loss

    @abstractmethod
    def of(
        self, hidden: torch.Tensor, master: torch.Tensor, labels: torch.Tensor, *, wants_gradients: bool
    ) -> tuple[torch.Tensor, Gradients | None]:
        """The summed loss, and perhaps its gradients by ``hidden`` and by ``master``, unless that is frozen."""

    def _rows(self, hidden: torch.Tensor) -> int:
        """Of the batch, on a chip."""
        return -(-hidden.shape[0] // self._constraints.shape.data_parallel_size)

    def _logits(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``[batch, seq, vocabulary]``, in fp32 or more."""
        logits = self._constraints.place(states @ weight.T, "logits")
        return logits.to(accumulation_dtype(states.dtype))


class BySequence(ChunkedCrossEntropy):
    """The partitioner knows no sum that is still to be made: it would exchange the head's gradient after each chunk.

    So each replica's part has a row of its own, and the rows are summed once.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._with_gradients, self._alone = Loop(self._chunk_with_gradients), Loop(self._chunk)
        self._with_frozen = Loop(self._chunk_with_frozen)

    def of(
        self, hidden: torch.Tensor, master: torch.Tensor, labels: torch.Tensor, *, wants_gradients: bool
    ) -> tuple[torch.Tensor, Gradients | None]:
        weight = self._constraints.gathered(master, self._spec, self._dtype)
        wide, device, replicas = accumulation_dtype(hidden.dtype), hidden.device, self._replicas
        walked, targets = self._chunks(hidden, labels, weight.shape[0])
        loss, turns = torch.zeros((), dtype=wide, device=device), walked.shape[0]
        if not wants_gradients:
            (loss,), _ = self._alone([loss], [walked, targets], [weight], turns=turns)
            return loss, None
        if not master.requires_grad:
            (loss,), (by_hidden,) = self._with_frozen([loss], [walked, targets], [weight], turns=turns)
            return loss, (self._joined(by_hidden, hidden), None)
        zeros = torch.zeros((replicas, *weight.shape), dtype=wide, device=device)
        own = self._constraints.place(zeros, "head gradients")
        (loss, own), (by_hidden,) = self._with_gradients([loss, own], [walked, targets], [weight], turns=turns)
        return loss, (self._joined(by_hidden, hidden), self._summed(own))

    def _joined(self, by_hidden: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The chunks' gradients as one, in the shape of ``hidden``."""
        by_hidden = by_hidden.transpose(0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])[:, : hidden.shape[1]]
        return self._constraints.place(by_hidden, "hidden")

    def _summed(self, own: torch.Tensor) -> torch.Tensor:
        """The replicas' gradients ``[replicas, vocabulary, hidden]`` as one, where the parameter lies.

        Each chip is sent the others' parts of its columns, in the compute type as all gradients are, and adds them up
        in fp32: the partitioner would make an all-reduce of the whole in fp32, four times the bytes.
        """
        shards = self._constraints.shape.shards
        parts = own.to(self._dtype).reshape(self._replicas // shards, shards, *own.shape[1:])
        parts = self._constraints.place(self._constraints.place(parts, "head parts"), "head columns")
        return self._constraints.mark(parts.to(own.dtype).sum(1).sum(0), self._spec)

    def _chunks(self, hidden: torch.Tensor, labels: torch.Tensor, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[chunks, batch, seq / chunks, …]``, padded where the sequence is no multiple."""
        batch, length, _ = hidden.shape
        columns = -(-vocabulary // self._constraints.shape.tensor)
        largest = max(1, min(length, self._chunk_elements // (self._rows(hidden) * columns)))
        size = _chunk_of(length, largest)
        count = -(-length // size)
        missing = count * size - length
        if missing:
            hidden = nn.functional.pad(hidden, (0, 0, 0, missing))
            labels = nn.functional.pad(labels, (0, missing), value=NO_LOSS)
        walked = hidden.reshape(batch, count, size, -1).transpose(0, 1)
        targets = labels.reshape(batch, count, size).transpose(0, 1)
        return self._constraints.place(walked, "hidden chunks"), self._constraints.place(targets * 1, "chunks")

    @property
    def _replicas(self) -> int:
        return self._constraints.shape.data_parallel_size

    def _chunk_with_gradients(self, carry: Tensors, rows: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        (loss, weight_gradient), (states, targets), (weight,) = carry, rows, constants
        added, by_logits = self._gradient_of(states, targets, weight)
        wide = weight_gradient.dtype
        batch, size, _ = states.shape
        own = contracted(
            "rtv,rth->rvh",
            by_logits.reshape(self._replicas, batch // self._replicas * size, -1),
            states.reshape(self._replicas, batch // self._replicas * size, -1),
        )
        weight_gradient = self._constraints.place(weight_gradient + own.to(wide), "head gradients")
        return [loss + added, weight_gradient], [self._constraints.place(by_logits @ weight, "hidden")]

    def _chunk_with_frozen(self, carry: Tensors, rows: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        added, by_logits = self._gradient_of(*rows, *constants)
        return [carry[0] + added], [self._constraints.place(by_logits @ constants[0], "hidden")]

    def _gradient_of(
        self, states: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed loss, and its gradient by the logits."""
        added, log_probabilities, is_target, supervised = self._loss_of(states, targets, weight)
        wide = log_probabilities.dtype
        by_logits = torch.where(supervised, log_probabilities.exp() - is_target.to(wide), 0.0).to(states.dtype)
        return added, self._constraints.place(by_logits, "logits")

    def _chunk(self, carry: Tensors, rows: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        return [carry[0] + self._loss_of(*rows, *constants)[0]], []

    def _loss_of(
        self, states: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Summed loss, log-probabilities, which of them are targets, and which positions count."""
        logits = self._logits(self._constraints.place(states, "hidden"), weight)
        log_probabilities = torch.log_softmax(logits, dim=-1)
        supervised = (targets != NO_LOSS).unsqueeze(-1)
        # A comparison fuses into its neighbours; gather and scatter are slow on a TPU.
        vocabulary = torch.arange(logits.shape[-1], device=logits.device, dtype=targets.dtype)
        is_target = vocabulary == targets.unsqueeze(-1)
        loss = -torch.where(is_target & supervised, log_probabilities, 0.0).sum()
        return loss, log_probabilities, is_target, supervised


class ByVocabulary(ChunkedCrossEntropy):
    """No chip ever holds more than a block of the head's weight, or of its gradient."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sums, self._gradients = Loop(self._add_block), Loop(self._block_gradients)
        self._by_hidden = Loop(self._block_with_frozen)

    def of(
        self, hidden: torch.Tensor, master: torch.Tensor, labels: torch.Tensor, *, wants_gradients: bool
    ) -> tuple[torch.Tensor, Gradients | None]:
        blocks, numbers = self._blocks(hidden, master)
        wide, turns = accumulation_dtype(hidden.dtype), blocks.shape[0] - 1
        others, last = [blocks[:turns], numbers[:turns]], [blocks[turns], numbers[turns]]
        zeros = self._constraints.place(torch.zeros(labels.shape, dtype=wide, device=hidden.device), "segments")
        so_far = [zeros - torch.inf, zeros, zeros + 0.0]
        if turns:
            so_far, _ = self._sums(so_far, others, [hidden, labels], turns=turns)
        # The last block of the sums is the first of the gradients: gathered once, its logits made once.
        block = self._block(last, hidden, labels)
        largest, total, picked = block.added(so_far)
        sums = largest + total.log()
        loss = torch.where(labels != NO_LOSS, sums - picked, 0.0).sum()
        if not wants_gradients:
            return loss, None
        nothing = torch.zeros_like(hidden, dtype=wide)
        constants = [hidden, labels, sums]
        if not master.requires_grad:
            by_hidden, _ = self._by_hidden_of(block, nothing, hidden, labels, sums)
            if turns:
                (by_hidden,), _ = self._by_hidden([by_hidden], others, constants, turns=turns)
            return loss, (by_hidden.to(hidden.dtype), None)
        by_hidden, by_last = self._gradients_of(block, nothing, hidden, labels, sums)
        by_block = by_last.unsqueeze(0)
        if turns:
            (by_hidden,), (by_others,) = self._gradients([by_hidden], others, constants, turns=turns)
            by_block = torch.cat([by_others, by_block])
        by_weight = by_block.transpose(0, 1).reshape(master.shape)
        return loss, (by_hidden.to(hidden.dtype), self._constraints.mark(by_weight, self._spec))

    def _blocks(self, hidden: torch.Tensor, master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[blocks, tensor, size, hidden]`` of the weight, still split, and the tokens ``[blocks, tensor · size]``.

        Each part of the mesh's tensor axis gives its share to every block, so that none has to be moved.
        """
        tensor = self._constraints.shape.tensor
        if "tensor" not in self._spec:
            tensor = 1
        columns = master.shape[0] // tensor
        # Half, because beside a block's logits lies its weight, in more than one layout.
        largest = max(1, self._chunk_elements // 2 // (self._rows(hidden) * hidden.shape[1]))
        size = _divisor_of(columns, largest)
        small = self._constraints.mark(computed(master, self._dtype), self._spec)
        blocks = small.reshape(tensor, columns // size, size, -1).transpose(0, 1)
        numbers = torch.arange(master.shape[0], device=master.device, dtype=torch.int32)
        numbers = numbers.reshape(tensor, columns // size, size).transpose(0, 1).reshape(columns // size, -1)
        return self._constraints.mark(blocks, (None, self._spec[0], None, self._spec[1])), numbers

    def _add_block(self, carry: Tensors, rows: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        return self._block(rows, *constants).added(carry), []

    def _block_gradients(self, carry: Tensors, rows: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        hidden, labels, sums = constants
        by_hidden, by_block = self._gradients_of(self._block(rows, hidden, labels), carry[0], hidden, labels, sums)
        return [by_hidden], [by_block]

    def _block_with_frozen(self, carry: Tensors, rows: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        hidden, labels, sums = constants
        return [self._by_hidden_of(self._block(rows, hidden, labels), carry[0], hidden, labels, sums)[0]], []

    def _gradients_of(
        self, block: _Block, by_hidden: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``by_hidden`` and the block's part of it, and the gradient of the block's weight, as the block lies."""
        by_hidden, by_logits = self._by_hidden_of(block, by_hidden, hidden, labels, sums)
        by_block = self._constraints.mark(contracted("bsv,bsh->vh", by_logits, hidden), self._spec)
        by_block = by_block.reshape(block.shape)
        return by_hidden, self._constraints.mark(by_block, (self._spec[0], None, self._spec[1]))

    def _by_hidden_of(
        self, block: _Block, by_hidden: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``by_hidden`` and the block's part of it, and the gradient by the block's logits."""
        logits = block.logits
        probabilities = (logits - sums.unsqueeze(-1)).exp() - block.is_target.to(logits.dtype)
        by_logits = torch.where((labels != NO_LOSS).unsqueeze(-1), probabilities, 0.0).to(hidden.dtype)
        by_logits = self._constraints.place(by_logits, "logits")
        by_hidden = by_hidden + (by_logits @ block.weight).to(by_hidden.dtype)
        return self._constraints.place(by_hidden, "hidden"), by_logits

    def _block(self, rows: Tensors, hidden: torch.Tensor, labels: torch.Tensor) -> _Block:
        block, numbers = rows
        weight = block.reshape(-1, block.shape[-1])
        if self._spec[1] is not None:
            weight = self._constraints.mark(weight, (self._spec[0], None))
        logits = self._logits(self._constraints.place(hidden, "hidden"), weight)
        return _Block(block.shape, weight, logits, numbers == labels.unsqueeze(-1))


@dataclass(frozen=True)
class _Block:
    """A part of the vocabulary."""

    shape: torch.Size
    """``[tensor, size, hidden]``, as its weight is split."""
    weight: torch.Tensor
    """Gathered, ``[tensor · size, hidden]``."""
    logits: torch.Tensor
    """``[batch, seq, tensor · size]``."""
    is_target: torch.Tensor

    def added(self, sums: Tensors) -> Tensors:
        """Each token's largest logit so far, what softmax divides by (relative to it), and its target's logit."""
        largest, total, picked = sums
        now = torch.maximum(largest, self.logits.amax(-1))
        total = total * (largest - now).exp() + (self.logits - now.unsqueeze(-1)).exp().sum(-1)
        return [now, total, picked + torch.where(self.is_target, self.logits, 0.0).sum(-1)]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: ChunkedCrossEntropy, hidden: torch.Tensor, master: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        loss, gradients = rule.of(hidden, master, labels, wants_gradients=any(ctx.needs_input_grad[1:3]))
        if gradients is not None:
            ctx.save_for_backward(*gradients)
        ctx.master_dtype = master.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (scale,) = gradients
        by_hidden, by_weight = ctx.saved_tensors
        own = None if by_weight is None else scaled(by_weight, scale, ctx.master_dtype)
        return None, scaled(by_hidden, scale, by_hidden.dtype), own, None


def _chunk_of(length: int, largest: int) -> int:
    """A chunk's length: a divisor of ``length``, unless that would be far shorter than what may be."""
    divisor = _divisor_of(length, largest)
    return divisor if divisor > largest // 4 else math.ceil(length / math.ceil(length / largest))


def _divisor_of(length: int, largest: int) -> int:
    """The largest divisor that is no more than ``largest``."""
    return next(size for size in range(min(length, largest), 0, -1) if length % size == 0)
