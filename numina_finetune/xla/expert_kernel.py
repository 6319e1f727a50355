"""gpt-oss's experts as per-chip functions over a mesh, forward and backward.

Tokens are split over all batch axes, experts over ``expert``, their matrices' rows over ``fsdp`` (gathered here, and
their gradients reduce-scattered) and their inner dimension over ``tensor``. Two forms:

- dropless: the tokens of an expert group are gathered, sorted by expert, and multiplied group by group (megablox, JAX's
  grouped products for TPUs, https://arxiv.org/abs/2211.15841), in as many blocks of rows as the routing sends.
- capacity: each chip sends every expert the same number of rows, by all-to-all (https://arxiv.org/abs/2006.16668), and
  drops what is over.

Nothing of torch is in here; `numina_finetune.xla.experts` calls it from a PyTorch/XLA program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas.ops.tpu.megablox import ops as megablox
from jax.sharding import PartitionSpec

from numina_finetune.xla.jax_lowering import Axes, on_each_chip

TILES = (512, 1024, 1024)
"""Rows, inner dimension and columns that the grouped product takes at a time, at most."""
LANES = 128
"""Inner dimensions and columns are taken in multiples of this; backward takes each for the other."""
SLOT_MULTIPLE = 16
"""Rows of an expert's buffer come in such numbers."""
BLOCK_OF_MEAN = 1.25
"""Rows that a chip's experts compute at a time, over their mean: what balanced routing sends them is one block."""

AS_NEEDED = "numina_as_needed"
"""Scope of the loop over further blocks, which does not turn where routing is balanced."""

_Weights = tuple[Any, Any, Any, Any, Any, Any]
"""Of gates, ups ``[experts, hidden, inner]`` and downs ``[experts, inner, hidden]``, and their biases."""
_Product = Callable[[Any, Any, Any], Any]
"""Rows with weights and biases, each expert's own."""
_OfSorted = Callable[[Any], Callable[[Any, _Weights], Any]]


@dataclass(frozen=True)
class Experts:
    """The experts of one layer.

    The functions take ``hidden [tokens, hidden]``, ``indices [tokens, top_k]`` int32, ``shares [tokens, top_k]``,
    ``gate_up [experts, hidden, 2 · inner]`` (gate and up interleaved), its bias, ``down [experts, inner, hidden]`` and
    its bias.
    """

    alpha: float
    limit: float
    capacity: float | None
    """Rows an expert takes from a chip, over the mean; None = dropless."""
    axes: Axes
    batch_axes: tuple[str, ...]
    weight_specs: tuple[tuple[Any, ...], ...]
    """Partitions of the four weights."""
    interpret: bool = False
    """Run kernels' programs as plain operations, on any device."""

    @property
    def forward(self) -> Callable[..., Any]:
        """To ``[tokens, hidden]``, and how many of the ``tokens · top_k`` assignments were dropped, an fp32 scalar."""
        rows = PartitionSpec(self.batch_axes, None)
        weights = [PartitionSpec(*spec) for spec in self.weight_specs]
        return on_each_chip(self._of_chip, self.axes, (rows, rows, rows, *weights), (rows, PartitionSpec()))

    @property
    def backward(self) -> Callable[..., Any]:
        """``(hidden, indices, shares, four weights, gradient)`` to the gradients of all but the indices."""

        def back(hidden: Any, indices: Any, *others: Any) -> Any:
            *given, gradient = others

            def of(hidden: Any, *given: Any) -> Any:
                return self.forward(hidden, indices, *given)[0]

            _, pull = jax.vjp(of, hidden, *given)
            return pull(gradient)

        return back

    def _of_chip(
        self, hidden: Any, indices: Any, shares: Any, gate_up: Any, gate_up_bias: Any, down: Any, down_bias: Any
    ) -> tuple[Any, Any]:
        rows_axes, columns_axes = self.weight_specs[0][1], self.weight_specs[2][2]
        # What follows wants other layouts. Without these the compiler would give them to the whole stack of layers,
        # in a second copy of the fp32 masters that lives as long as the loop over them (5 GB a chip of 120B on 64).
        gate_up, down = (with_layout_constraint(part, Layout(major_to_minor=(0, 1, 2))) for part in (gate_up, down))
        # Gates apart from ups on the part at hand, before it is gathered.
        halves = [gate_up[..., ::2], gate_up[..., 1::2]]
        halves = [jax.lax.all_gather(half, rows_axes, axis=1, tiled=True) if rows_axes else half for half in halves]
        down = jax.lax.all_gather(down, columns_axes, axis=2, tiled=True) if columns_axes else down
        # Each chip of the tensor axis has a part of the sum, and a part of the bias that is added to it.
        biases = gate_up_bias[..., ::2], gate_up_bias[..., 1::2], down_bias / self._parts
        if self.capacity is None:
            mixed, dropped = self._dropless(hidden, indices, shares, (*halves, down, *biases))
        else:
            mixed, dropped = self._in_capacity(hidden, indices, shares, (*halves, down, *biases))
        return jax.lax.psum(mixed, "tensor") if self._parts > 1 else mixed, dropped

    def _dropless(self, hidden: Any, indices: Any, shares: Any, weights: _Weights) -> tuple[Any, Any]:
        group, own = self._group, weights[0].shape[0]
        mean = indices.size
        if group > 1:
            hidden, indices, shares = (
                jax.lax.all_gather(part, "expert", axis=0, tiled=True) for part in (hidden, indices, shares)
            )
        chosen = indices.T - (jax.lax.axis_index("expert") * own if group > 1 else 0)
        block = mean if group == 1 else _rounded_up(BLOCK_OF_MEAN * mean, TILES[0])
        mixed = _walk(self._of_sorted, _Rows.of(chosen, own, block), hidden, shares.T, weights)
        if group > 1:
            mixed = jax.lax.psum_scatter(mixed, "expert", scatter_dimension=0, tiled=True)
        return mixed, jnp.zeros((), jnp.float32)

    def _in_capacity(self, hidden: Any, indices: Any, shares: Any, weights: _Weights) -> tuple[Any, Any]:
        assert self.capacity is not None
        group, (tokens, top_k) = self._group, indices.shape
        experts = weights[0].shape[0] * group
        # No expert is chosen twice by a token.
        slots = min(_rounded_up(self.capacity * tokens * top_k / experts, SLOT_MULTIPLE), tokens)
        chosen = indices.T.reshape(-1)
        order = jnp.argsort(chosen, stable=True).astype(jnp.int32)
        place = jnp.argsort(order).astype(jnp.int32)
        sizes = _count(chosen, experts)
        first = jnp.cumsum(sizes) - sizes
        turn = place - first[chosen]
        fits, nowhere = turn < slots, experts * slots
        slot = jnp.where(fits, chosen * slots + turn, nowhere)
        number = jnp.arange(slots, dtype=jnp.int32)[None]
        source = order[jnp.minimum(first[:, None] + number, tokens * top_k - 1)]
        source = jnp.where(number < sizes[:, None], source, tokens * top_k).reshape(-1)
        rows = _sent(hidden, source, slot).reshape(experts, slots, -1)
        if group > 1:
            rows = jax.lax.all_to_all(rows, "expert", 0, 1, tiled=True)
        results = self._sum_of(_batched, rows, weights)
        if group > 1:
            results = jax.lax.all_to_all(results, "expert", 1, 0, tiled=True)
        results = _returned(results.reshape(experts * slots, -1), source, slot).reshape(top_k, tokens, -1)
        mixed = sum(
            result.astype(jnp.float32) * share[:, None]
            for result, share in zip(results, shares.T * fits.reshape(top_k, tokens), strict=True)
        )
        dropped = jax.lax.psum((~fits).sum(dtype=jnp.float32), self.batch_axes)
        return mixed.astype(hidden.dtype), dropped

    def _sum_of(self, multiply: _Product, rows: Any, weights: _Weights) -> Any:
        """The experts' results for their rows.

        Args:
            multiply: ``(rows, weights, bias)``, each expert's own.
        """
        gate_weight, up_weight, down, gate_bias, up_bias, down_bias = weights
        gate = jnp.minimum(multiply(rows, gate_weight, gate_bias), self.limit)
        up = jnp.clip(multiply(rows, up_weight, up_bias), -self.limit, self.limit)
        # JAX would round alpha (1.702) to the rows' type.
        share = jax.nn.sigmoid(self.alpha * gate.astype(jnp.float32)).astype(gate.dtype)
        gated = ((up + 1) * (gate * share)).astype(rows.dtype)
        return multiply(gated, down, down_bias)

    def _of_sorted(self, sizes: Any) -> Callable[[Any, _Weights], Any]:
        """:meth:`_sum_of` for rows that are sorted by expert, so many of each."""
        return partial(self._sum_of, self._grouped(sizes))

    def _grouped(self, sizes: Any) -> _Product:
        """The product for sorted rows; rows that are nobody's give 0."""
        ends = jnp.cumsum(sizes)

        def multiply(rows: Any, weights: Any, bias: Any) -> Any:
            count = rows.shape[0]
            number = jnp.arange(count, dtype=jnp.int32)[:, None]
            of_expert = ((number >= ends - sizes) & (number < ends)).astype(rows.dtype)
            block = next(size for size in (TILES[0], 256, 128, 64, 32, 16, 8, 4, 2, 1) if count % size == 0)
            inner, columns = (
                min(tile, _rounded_up(size, LANES)) for tile, size in zip(TILES[1:], weights.shape[1:], strict=True)
            )
            tiles = block, inner, columns
            # By position, for jax.custom_vjp: no group offset, nothing to add to, not transposed.
            product = megablox.gmm(rows, weights, sizes, rows.dtype, tiles, None, None, False, self.interpret)
            # The kernel leaves rows of no group as they are, whatever that is.
            return jnp.where(number < ends[-1], product + of_expert @ bias, 0)

        return multiply

    @property
    def _group(self) -> int:
        """Chips among which the experts are divided."""
        return dict(self.axes)["expert"] if self.weight_specs[0][0] else 1

    @property
    def _parts(self) -> int:
        """Chips among which each expert's inner dimension is divided."""
        return dict(self.axes)["tensor"] if self.weight_specs[2][1] else 1


def _batched(rows: Any, weights: Any, bias: Any) -> Any:
    """The product for ``rows [experts, rows, k]``."""
    return jnp.einsum("etk,ekn->etn", rows, weights) + bias[:, None]


def _count(chosen: Any, experts: int) -> Any:
    """``[experts]``: how often each of them is in ``chosen``."""
    return (chosen[:, None] == jnp.arange(experts, dtype=jnp.int32)[None]).sum(0, dtype=jnp.int32)


def _rounded_up(size: float, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


# --- without drops: block after block of the rows that there are --------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(sum_of: _OfSorted, rows: _Rows, hidden: Any, shares: Any, weights: _Weights) -> Any:
    """The weighted results of this chip's experts for all tokens.

    There are as many turns as the routing asks for: what is computed follows the load, and no load is too much. JAX
    does not differentiate such a loop: backward is another one, which computes each block again.

    Args:
        sum_of: see :meth:`Experts._of_sorted`.
        hidden: ``[tokens, hidden]``.
        shares: ``[top_k, tokens]``.
    """

    def turn(number: Any) -> Any:
        token, _, sizes = rows.block(number)
        return rows.added_up(number, sum_of(sizes)(hidden[token], weights), shares)

    return rows.walk(turn).astype(hidden.dtype)


def _walk_back(sum_of: _OfSorted, saved: Any, gradient: Any) -> tuple[Any, ...]:
    rows, hidden, shares, weights = saved

    def turn(number: Any) -> Any:
        token, assignment, sizes = rows.block(number)
        results, pull = jax.vjp(sum_of(sizes), hidden[token], weights)
        given = gradient[token].astype(jnp.float32)
        share = shares.reshape(-1)[assignment]
        by_row, by_weights = pull((given * share[:, None]).astype(results.dtype))
        by_share = (results.astype(jnp.float32) * given).sum(-1)
        by_share = jnp.where(rows.within(number), by_share[rows.number_within(number)], 0)
        return rows.added_up(number, by_row, jnp.ones_like(shares)), by_share, by_weights

    by_hidden, by_share, by_weights = rows.walk(turn)
    return None, by_hidden.astype(hidden.dtype), by_share.astype(shares.dtype), by_weights


def _walk_on(sum_of: _OfSorted, *given: Any) -> tuple[Any, Any]:
    return _walk(sum_of, *given), given


_walk.defvjp(_walk_on, _walk_back)


@partial(jax.tree_util.register_dataclass, data_fields=("is_own", "place", "order", "ends"), meta_fields=("size",))
@dataclass(frozen=True)
class _Rows:
    """The assignments to a chip's experts, sorted by expert; those of other chips come last, and are left out."""

    is_own: Any
    """``[top_k, tokens]``."""
    place: Any
    """``[top_k, tokens]``: where each assignment stands in the order."""
    order: Any
    """The assignments, numbered over ``[top_k, tokens]``; padded to whole blocks."""
    ends: Any
    """``[experts]``: where each expert's rows end."""
    size: int
    """Of a block."""

    @staticmethod
    def of(chosen: Any, experts: int, size: int) -> _Rows:
        """
        Args:
            chosen: ``[top_k, tokens]`` int32, the expert's number among this chip's; any other number is none of them.
        """
        is_own = (chosen >= 0) & (chosen < experts)
        keys = jnp.where(is_own, chosen, experts).reshape(-1)
        order = jnp.argsort(keys, stable=True).astype(jnp.int32)
        place = jnp.argsort(order).astype(jnp.int32).reshape(chosen.shape)
        padding = -keys.size % size
        return _Rows(is_own, place, jnp.pad(order, (0, padding)), jnp.cumsum(_count(keys, experts)), size)

    def walk(self, turn: Callable[[Any], Any]) -> Any:
        """The sum of ``turn(number)`` over the blocks that have rows; the first one always counts as such."""
        first = turn(0)
        if self.order.size == self.size:
            return first
        with jax.named_scope(AS_NEEDED):
            count = (self.ends[-1] + self.size - 1) // self.size
            return jax.lax.fori_loop(
                1, count, lambda number, so_far: jax.tree.map(jnp.add, so_far, turn(number)), first
            )

    def block(self, number: Any) -> tuple[Any, Any, Any]:
        """Tokens and assignments ``[size]`` of a block, and how many rows in it are each expert's."""
        assignment = jax.lax.dynamic_slice(self.order, (number * self.size,), (self.size,))
        ends = jnp.clip(self.ends - number * self.size, 0, self.size)
        return assignment % self.place.shape[1], assignment, jnp.diff(ends, prepend=0).astype(jnp.int32)

    def within(self, number: Any) -> Any:
        """``[top_k, tokens]``: whether an assignment's row is in the block."""
        first = number * self.size
        return self.is_own & (self.place >= first) & (self.place < first + self.size)

    def number_within(self, number: Any) -> Any:
        """``[top_k, tokens]``: which row of the block it is; any, where it is in another one."""
        return jnp.clip(self.place - number * self.size, 0, self.size - 1)

    def added_up(self, number: Any, results: Any, shares: Any) -> Any:
        """``[tokens, hidden]`` in fp32: a block's rows, weighted, at their tokens.

        By gathering, one choice after another: a scatter would be added up element by element, and a sum over all
        choices at once costs a TPU five times as much.
        """
        within, place = self.within(number), self.number_within(number)
        return sum(
            jnp.where(own[:, None], results[row], 0).astype(jnp.float32) * share[:, None]
            for own, row, share in zip(within, place, shares, strict=True)
        )


# --- with slots: rows are moved by permutations and their inverses, forward and backward ---------------------------


@partial(jax.custom_vjp)
def _sent(hidden: Any, source: Any, slot: Any) -> Any:
    """Rows in their slots; an empty slot is 0."""
    tokens = hidden.shape[0]
    return _or_zero(hidden, jnp.where(source < slot.size, source % tokens, tokens))


def _sent_on(hidden: Any, source: Any, slot: Any) -> tuple[Any, Any]:
    return _sent(hidden, source, slot), (slot, hidden.shape[0])


def _sent_back(saved: Any, gradient: Any) -> tuple[Any, None, None]:
    slot, tokens = saved
    parts = _or_zero(gradient, slot).reshape(-1, tokens, gradient.shape[-1]).astype(jnp.float32)
    return sum(parts).astype(gradient.dtype), None, None


_sent.defvjp(_sent_on, _sent_back)


@partial(jax.custom_vjp)
def _returned(results: Any, source: Any, slot: Any) -> Any:
    """Back from the slots to the assignments; a dropped one is 0."""
    return _or_zero(results, slot)


_returned.defvjp(
    lambda results, source, slot: (_or_zero(results, slot), source),
    lambda source, gradient: (_or_zero(gradient, source), None, None),
)


def _or_zero(rows: Any, number: Any) -> Any:
    """The rows of these numbers; 0 for a number that is none."""
    return jnp.where((number < rows.shape[0])[:, None], rows[jnp.minimum(number, rows.shape[0] - 1)], 0)
