"""What else would fit, and what would cost least: a search of a few compilations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from numina_finetune.config import REMAT
from numina_finetune.errors import ConfigError
from numina_finetune.mesh import MeshShape
from numina_finetune.plan.compilation import Candidate, CompilationFailed, Compiler, Fitted, Outcome

EXPERT_GROUPS = (8, 4, 16)
"""Chips among which experts are divided, in the order in which they are tried."""
MOST_COMPILATIONS = 8
_FOR_THE_BATCH = 4
"""Compilations that the search for the batch may use, the requested one included."""


@dataclass(frozen=True)
class BatchAnswer:
    """Which batches of the requested step fit."""

    largest: Fitted | None
    """None where none of those fits that were tried."""
    too_large: int | None
    """The smallest larger one that the compiler refused; None where it refused none."""
    reckoned: int | None
    """The largest one by the line through what was compiled."""
    settled: bool
    """Whether line and compilations agree; else the search ended first."""


@dataclass(frozen=True)
class Findings:
    """All that was compiled."""

    requested: Outcome
    outcomes: tuple[Outcome, ...]
    """In the order of compilation, the requested one first."""
    batch: BatchAnswer
    unanswered: tuple[str, ...]
    """Questions for which no compilation was left."""
    failed: tuple[tuple[Candidate, str], ...]
    """What could not be compiled at all, and why."""

    def cheapest(self, cost: Callable[[Fitted], float]) -> Fitted | None:
        """The outcome that costs least; None where nothing fits."""
        fitted = [one for one in self.outcomes if isinstance(one, Fitted)]
        return min(fitted, key=cost, default=None)


class Search:
    """Compiles candidates, none twice, and no more than ``budget`` of them."""

    def __init__(
        self,
        compiler: Compiler,
        capacity: int,
        budget: int = MOST_COMPILATIONS,
        *,
        allowed: Callable[[Candidate], Candidate | None] = lambda candidate: candidate,
    ) -> None:
        """
        Args:
            capacity: bytes that a step may hold.
            allowed: the candidate as it would run (with its accumulation), or None where its batch cannot be.
        """
        self._compiler, self._capacity, self._budget, self._allowed = compiler, capacity, budget, allowed
        self._outcomes: dict[Candidate, Outcome] = {}
        self._failed: dict[Candidate, str] = {}

    def run(self, requested: Candidate, geometry: Mapping[str, Any]) -> Findings:
        """Compile the requested step, then look for the largest batch, another remat policy, another mesh.

        Raises:
            ConfigError, CompilationFailed: the requested step cannot be compiled; see :class:`Compiler`.
        """
        first = self._compile(requested)
        assert first is not None, "a search has at least one compilation"
        batch = self._largest_batch(requested)
        unanswered = [] if batch.settled else ["the largest batch"]
        base = requested
        if not self._fits(first):
            base = batch.largest.candidate if batch.largest else replace_batch(requested, 1)
        for question, others in (("remat", other_remats(base)), ("mesh", other_meshes(base, geometry))):
            for other in others:
                allowed = self._allowed(other)
                if allowed is not None and self._compile(allowed) is None and allowed not in self._failed:
                    unanswered.append(question)
                    break
        return Findings(first, tuple(self._outcomes.values()), batch, tuple(unanswered), tuple(self._failed.items()))

    def _compile(self, candidate: Candidate) -> Outcome | None:
        """None where no compilation is left, or where it fails; the first one's failure is the caller's."""
        if candidate not in self._outcomes:
            if candidate in self._failed or len(self._outcomes) + len(self._failed) >= self._budget:
                return None
            try:
                self._outcomes[candidate] = self._compiler(candidate)
            except (CompilationFailed, ConfigError) as error:
                if not self._outcomes:
                    raise
                self._failed[candidate] = str(error)
                return None
        return self._outcomes[candidate]

    def _fits(self, outcome: Outcome) -> bool:
        return isinstance(outcome, Fitted)

    def _largest_batch(self, requested: Candidate) -> BatchAnswer:
        """Memory is affine in the batch: two points give a line, the line a batch, and that batch is compiled."""
        tried: dict[int, Outcome] = {}
        wanted: int | None = requested.batch
        while wanted is not None and len(tried) < _FOR_THE_BATCH:
            candidate = self._allowed(replace_batch(requested, wanted))
            outcome = self._compile(candidate) if candidate else None
            if outcome is None:
                break
            tried[wanted] = outcome
            wanted = self._next(requested, tried)
        fits = {batch: one for batch, one in tried.items() if isinstance(one, Fitted) and self._fits(one)}
        best = max(fits, default=0)
        return BatchAnswer(
            fits.get(best),
            min((batch for batch in tried if batch > best), default=None),
            self._reckoned(tried),
            settled=wanted is None,
        )

    def _next(self, requested: Candidate, tried: Mapping[int, Outcome]) -> int | None:
        """The next batch to compile; None where the answer stands."""
        best = max((batch for batch, outcome in tried.items() if self._fits(outcome)), default=0)
        refused = min((batch for batch, outcome in tried.items() if not self._fits(outcome)), default=math.inf)
        if len(tried) == 1:
            return self._second_batch(requested, fits=best > 0)
        reckoned = self._reckoned(tried)
        if reckoned is None:
            return None
        wanted = self._allowed_below(requested, int(min(reckoned, refused - 1)))
        return wanted if wanted is not None and wanted > best else None

    def _second_batch(self, requested: Candidate, *, fits: bool) -> int | None:
        """Twice the batch, or half of it: far enough for a line that is worth something."""
        batches = range(requested.batch * 2, requested.batch * 4) if fits else range(requested.batch // 2, 0, -1)
        return next((batch for batch in batches if self._allowed(replace_batch(requested, batch))), None)

    def _reckoned(self, tried: Mapping[int, Outcome]) -> int | None:
        line = _line({batch: outcome.peak_bytes for batch, outcome in tried.items()})
        return None if line is None else max(0, math.floor((self._capacity - line[1]) / line[0]))

    def _allowed_below(self, requested: Candidate, batch: int) -> int | None:
        return next((one for one in range(batch, 0, -1) if self._allowed(replace_batch(requested, one))), None)


def replace_batch(candidate: Candidate, batch: int) -> Candidate:
    """The same step with so many rows a device."""
    return replace(candidate, config=replace(candidate.config, per_device_train_batch_size=batch))


def other_remats(candidate: Candidate) -> Iterator[Candidate]:
    """The same step with the other policies."""
    for policy in REMAT:
        if policy != candidate.config.remat:
            yield replace(candidate, config=replace(candidate.config, remat=policy))


def other_meshes(candidate: Candidate, geometry: Mapping[str, Any]) -> Iterator[Candidate]:
    """The same rows a chip on other meshes: all on fsdp, two replicas, or each layer's matrices in two parts; where the
    model has experts, larger and smaller groups of chips among which they are divided."""
    slices = candidate.mesh.dcn
    chips = candidate.mesh.devices // slices
    experts = int(geometry.get("num_local_experts", 0))
    shapes = [MeshShape(dcn=slices, fsdp=chips)]
    if experts:
        groups = (group for group in EXPERT_GROUPS if chips % group == 0 and experts % group == 0)
        shapes += [MeshShape(dcn=slices, fsdp=chips // group, expert=group) for group in groups]
    elif chips % 2 == 0 and chips > 2:
        shapes.append(MeshShape(dcn=slices, data=2, fsdp=chips // 2))
        if int(geometry.get("num_key_value_heads", 1)) % 2 == 0:
            shapes.append(MeshShape(dcn=slices, fsdp=chips // 2, tensor=2))
    for shape in shapes:
        if shape == candidate.mesh:
            continue
        rows = candidate.batch * candidate.mesh.data_parallel_size
        if rows % shape.data_parallel_size == 0:
            yield replace(replace_batch(candidate, rows // shape.data_parallel_size), mesh=shape)


def _line(points: Mapping[int, int]) -> tuple[float, float] | None:
    """Slope and height at 0 through the two largest batches; None where memory does not grow."""
    if len(points) < 2:
        return None
    (low, small), (high, large) = sorted(points.items())[-2:]
    slope = (large - small) / (high - low)
    return (slope, small - slope * low) if slope > 0 else None
