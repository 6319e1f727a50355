"""The search for the largest batch, against a compiler that is a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from numina_finetune.config import RunConfig
from numina_finetune.mesh import MeshShape
from numina_finetune.plan.compilation import Candidate, CompilationFailed, Fitted, Outcome, TooLarge
from numina_finetune.plan.costs import Costs
from numina_finetune.plan.memory import Memory
from numina_finetune.plan.search import MOST_COMPILATIONS, Findings, Search, other_meshes

CAPACITY = 16_000
GEOMETRY = {"num_key_value_heads": 8}


@dataclass
class Formula:
    """Memory by the batch; refuses what is over ``limit``, as the compiler does."""

    memory: Callable[[int], int]
    limit: int = CAPACITY
    asked: list[Candidate] = field(default_factory=list)

    def __call__(self, candidate: Candidate) -> Outcome:
        self.asked.append(candidate)
        peak = self.memory(candidate.batch)
        if peak > self.limit:
            return TooLarge(candidate, peak, self.limit, [], 0.0, 0.0)
        return Fitted(candidate, peak, peak, {}, Memory(()), Costs(cycles=1.0), 1, 1, 6.0, 0.0, 0.0, 0.0)


def candidate(batch: int, **options: object) -> Candidate:
    config = RunConfig(model_name="m", per_device_train_batch_size=batch, remat="full")
    return Candidate(replace(config, **options), MeshShape(fsdp=8))  # type: ignore[arg-type]


def search(
    formula: Formula, batch: int, budget: int = MOST_COMPILATIONS, **options: Callable[[Candidate], Candidate | None]
) -> Findings:
    return Search(formula, CAPACITY, budget, **options).run(candidate(batch), GEOMETRY)


@pytest.mark.parametrize("begin", [1, 3, 8, 15, 16, 40])
def test_the_largest_batch_is_found_from_anywhere(begin: int) -> None:
    formula = Formula(lambda batch: 1000 + 970 * batch)  # 15 rows fit, 16 do not
    findings = search(formula, begin)
    assert findings.batch.largest is not None
    assert findings.batch.largest.candidate.batch == 15
    assert findings.batch.settled
    assert len(formula.asked) <= MOST_COMPILATIONS
    assert len(formula.asked) == len(set(formula.asked)), "nothing is compiled twice"


def test_the_winner_was_compiled_and_not_reckoned_only() -> None:
    # Padding makes the line bend: more than the first points promise.
    formula = Formula(lambda batch: 1000 + 900 * batch + (800 if batch > 12 else 0))
    findings = search(formula, 4)
    largest = findings.batch.largest
    assert largest is not None and largest.candidate in formula.asked
    assert largest.peak_bytes <= CAPACITY
    assert largest.candidate.batch == 15


def test_nothing_fits() -> None:
    findings = search(Formula(lambda batch: CAPACITY + batch), 1)
    assert isinstance(findings.requested, TooLarge)
    assert findings.batch.largest is None


def test_a_step_over_the_limit_finds_the_batch_below() -> None:
    findings = search(Formula(lambda batch: 2000 + 2000 * batch), 16)
    assert isinstance(findings.requested, TooLarge)
    assert findings.batch.largest is not None and findings.batch.largest.candidate.batch == 7
    assert findings.outcomes[0] is findings.requested


def test_one_compilation_means_one() -> None:
    formula = Formula(lambda batch: 1000 * batch)
    findings = search(formula, 2, budget=1)
    assert len(formula.asked) == 1
    assert "the largest batch" in findings.unanswered


def test_a_global_batch_allows_only_its_divisors() -> None:
    def allowed(one: Candidate) -> Candidate | None:
        return one if 24 % one.batch == 0 else None

    findings = search(Formula(lambda batch: 1000 * batch), 2, allowed=allowed)
    assert findings.batch.largest is not None
    assert findings.batch.largest.candidate.batch == 12, "16 would fit, but does not divide 24"


def test_other_policies_and_meshes_are_tried_with_the_same_rows() -> None:
    formula = Formula(lambda batch: 1000 + batch)
    search(formula, 4)
    assert {one.config.remat for one in formula.asked} == {"none", "dots", "full"}
    rows = {one.batch * one.mesh.data_parallel_size for one in formula.asked if one.mesh != MeshShape(fsdp=8)}
    assert rows == {32}


def test_a_candidate_that_cannot_be_compiled_ends_no_search() -> None:
    formula = Formula(lambda batch: 1000 + batch)

    def compiler(one: Candidate) -> Outcome:
        if one.config.remat == "none":
            raise CompilationFailed("Mosaic failed")
        return formula(one)

    findings = Search(compiler, CAPACITY).run(candidate(4), GEOMETRY)
    assert [(one.config.remat, why) for one, why in findings.failed] == [("none", "Mosaic failed")]
    assert {one.config.remat for one in formula.asked} == {"dots", "full"}
    assert {one.mesh.tensor for one in formula.asked} == {1, 2}


def test_a_requested_step_that_cannot_be_compiled_is_the_callers() -> None:
    def compiler(one: Candidate) -> Outcome:
        raise CompilationFailed("Mosaic failed")

    with pytest.raises(CompilationFailed, match="Mosaic"):
        Search(compiler, CAPACITY).run(candidate(4), GEOMETRY)


def test_tensor_parallelism_needs_heads_to_split() -> None:
    odd = {one.mesh.tensor for one in other_meshes(candidate(4), {"num_key_value_heads": 3})}
    even = {one.mesh.tensor for one in other_meshes(candidate(4), GEOMETRY)}
    assert odd == {1} and even == {1, 2}
