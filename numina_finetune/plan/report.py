"""What a plan found, for people and for machines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from numina_finetune.plan.compilation import Candidate, Fitted, Outcome, TooLarge
from numina_finetune.plan.memory import KINDS, Allocation
from numina_finetune.plan.roofline import bound_of, model_flops, ranking_seconds
from numina_finetune.plan.search import Findings
from numina_finetune.plan.training import Training
from numina_finetune.tpu import Slice

LARGEST_SHOWN = 8
_KINDS_SHOWN = (*KINDS, "program", "other")
"""``other``: alignment, fragmentation and scratch space of the compiler, which no array accounts for."""


@dataclass(frozen=True)
class Plan:
    """All that is reported."""

    model: str
    tpu: Slice
    requested: Candidate
    findings: Findings
    training: Training | None
    notes: tuple[str, ...]

    @property
    def capacity(self) -> int:
        """Bytes of memory of one chip."""
        return self.tpu.chip.hbm_bytes

    def fits(self, outcome: Outcome) -> bool:
        """Whether the compiler took the step, rather than refused it for memory."""
        return isinstance(outcome, Fitted)


def as_json(plan: Plan) -> dict[str, Any]:
    """The report with names that stay; what is not known is null."""
    outcome = plan.findings.requested
    fitted = outcome if isinstance(outcome, Fitted) else None
    bound = bound_of(fitted, plan.tpu) if fitted else None
    batch = plan.findings.batch
    cheapest = _cheapest(plan)
    return {
        "model": plan.model,
        "tpu": plan.tpu.accelerator,
        "topology": plan.tpu.topology,
        "chips": plan.requested.mesh.devices,
        "slices": plan.requested.mesh.dcn,
        **_candidate_json(plan.requested),
        "sequence_length": plan.requested.config.max_seq_length,
        "tokens_per_step": plan.requested.tokens,
        "fits": plan.fits(outcome),
        "peak_hbm_bytes": outcome.peak_bytes,
        "allocated_hbm_bytes": fitted.allocated_bytes if fitted else None,
        "hbm_capacity_bytes": outcome.limit_bytes if isinstance(outcome, TooLarge) else plan.capacity,
        "hbm_by_kind": memory_by_kind(fitted) if fitted else None,
        "compiler_memory": dict(fitted.sizes) if fitted else None,
        "largest_allocations": [asdict(one) for one in _largest(outcome)],
        "parameters": fitted.parameters if fitted else None,
        "active_parameters": fitted.active_parameters if fitted else None,
        "model_flops": model_flops(fitted) if fitted else None,
        "matmul_flops": fitted.costs.matmul_flops if fitted else None,
        "kernel_flops": fitted.costs.kernel_flops if fitted else None,
        "matmul_flops_ratio": _ratio(fitted) if fitted else None,
        "collective_bytes": fitted.costs.total_collective_bytes if fitted else None,
        "collectives": _collectives(fitted) if fitted else None,
        "estimated_cycles": fitted.costs.cycles if fitted else None,
        "estimated_seconds": fitted.costs.cycles / plan.tpu.chip.clock_hz if fitted else None,
        "bound_seconds": (
            {**{term: getattr(bound, term) for term in ("compute", "memory", "interconnect")}, "step": bound.seconds}
            if bound
            else None
        ),
        "trace_seconds": outcome.trace_seconds,
        "compile_seconds": outcome.compile_seconds,
        "compile_cpu_seconds": fitted.compile_cpu_seconds if fitted else None,
        "versions": dict(fitted.versions) if fitted else None,
        "compilations": [_outcome_json(plan, one) for one in plan.findings.outcomes],
        "largest_batch": batch.largest.candidate.batch if batch.largest else None,
        "smallest_batch_refused": batch.too_large,
        "largest_batch_reckoned": batch.reckoned,
        "cheapest": _candidate_json(cheapest.candidate) if cheapest else None,
        "unanswered": list(plan.findings.unanswered),
        "failed": [{**_candidate_json(candidate), "reason": reason} for candidate, reason in plan.findings.failed],
        "training": asdict(plan.training) if plan.training else None,
        "notes": list(plan.notes),
    }


def lines(plan: Plan) -> Iterable[str]:
    """The report for people."""
    outcome, requested, tpu = plan.findings.requested, plan.requested, plan.tpu
    of = f"{requested.mesh.dcn} slices of " if requested.mesh.dcn > 1 else ""
    counted = f" ({outcome.parameters / 1e9:.2f}B parameters)" if isinstance(outcome, Fitted) else ""
    yield (
        f"{plan.model}{counted} on {of}{tpu.accelerator}: {requested.mesh.devices} chips, {tpu.topology}, mesh "
        f"{requested.mesh}; {requested.batch} rows x {requested.config.max_seq_length} tokens a replica"
        f"{_accumulation(requested)}, remat {requested.config.remat}"
    )
    verdict = "fits" if plan.fits(outcome) else "DOES NOT FIT"
    limit = outcome.limit_bytes if isinstance(outcome, TooLarge) else plan.capacity
    yield f"memory: {_gb(outcome.peak_bytes)} of {_gb(limit)} a chip: {verdict}"
    if isinstance(outcome, Fitted):
        for kind, size in memory_by_kind(outcome).items():
            yield f"  {kind:<18} {_gb(size):>10}"
    yield "largest allocations:"
    yield from (f"  {_allocation(one)}" for one in _largest(outcome))
    if isinstance(outcome, Fitted):
        yield from _cost_lines(plan, outcome)
    else:
        yield f"traced in {outcome.trace_seconds:.0f} s, refused after {outcome.compile_seconds:.0f} s"
    yield from _advice_lines(plan)
    yield from (f"note: {note}" for note in plan.notes)


def memory_by_kind(fitted: Fitted) -> dict[str, float]:
    """Bytes by kind at the fullest point; together they are the peak, but for what is followed otherwise than the
    compiler places it."""
    kinds = dict(fitted.memory.by_kind)
    kinds["program"] = float(fitted.sizes["generated_code"])
    kinds["other"] = max(0.0, fitted.peak_bytes - sum(kinds.values()))
    return {kind: kinds[kind] for kind in _KINDS_SHOWN}


def _ratio(fitted: Fitted) -> float:
    """Products, those of kernels as these state them, over 6·N·tokens."""
    return (fitted.costs.matmul_flops + fitted.costs.kernel_flops) / model_flops(fitted)


def _cost_lines(plan: Plan, fitted: Fitted) -> Iterable[str]:
    costs, chip = fitted.costs, plan.tpu.chip
    useful = model_flops(fitted)
    kernels = f", {costs.kernel_flops / 1e12:.2f} more in kernels" if costs.kernel_flops else ""
    yield (
        f"products: {costs.matmul_flops / 1e12:.2f} TFLOP a chip and step{kernels}; 6·N·tokens is {useful / 1e12:.2f}: "
        f"{_ratio(fitted):.2f} times"
    )
    parts = ", ".join(
        f"{kind} {count:,.0f} x, {_gb(costs.collective_bytes[kind])}"
        for kind, count in sorted(costs.collective_count.items())
    )
    yield f"collectives: {_gb(costs.total_collective_bytes)} a chip and step ({parts or 'none'})"
    bound = bound_of(fitted, plan.tpu)
    yield (
        f"a step cannot take less than {_ms(bound.seconds)} (a bound, not a prediction): compute {_ms(bound.compute)}, "
        f"memory {_ms(bound.memory)}, interconnect {_ms(bound.interconnect)}"
    )
    yield (
        f"the compiler's own estimate: {costs.cycles:.3g} cycles = {_ms(costs.cycles / chip.clock_hz)}, without "
        "kernels and collectives"
    )
    versions = ", ".join(f"{name} {version}" for name, version in fitted.versions.items())
    yield (
        f"traced in {fitted.trace_seconds:.0f} s, compiled in {fitted.compile_seconds:.0f} s "
        f"({fitted.compile_cpu_seconds:.0f} s of processor time; {versions})"
    )


def _advice_lines(plan: Plan) -> Iterable[str]:
    findings = plan.findings
    if len(findings.outcomes) > 1:
        yield "also compiled:"
        for one in findings.outcomes[1:]:
            yield f"  {_summary(plan, one)}"
    for candidate, reason in findings.failed:
        yield f"  {candidate}: could not be compiled: {reason.splitlines()[0][:200]}"
    batch = findings.batch
    if len(findings.outcomes) > 1 or batch.settled:
        if batch.largest is None:
            told = "advice: none of the batches that were compiled fits with this remat policy and mesh"
        else:
            refused = f"; {batch.too_large} was refused" if batch.too_large else ""
            rows = plan.requested.config.global_batch_size
            bound = f", of those that make up the global batch of {rows} rows," if rows else ""
            told = (
                f"advice: the largest batch that fits{bound} is {batch.largest.candidate.batch} "
                f"({_gb(batch.largest.peak_bytes)}, compiled){refused}"
            )
        if not batch.settled and batch.reckoned is not None:
            told += f"; by the line through what was compiled up to {batch.reckoned} would fit (not compiled)"
        yield told
    cheapest = _cheapest(plan)
    if cheapest is not None and len(findings.outcomes) > 1:
        yield f"advice: of what was compiled, a token costs least with {_flags(cheapest.candidate)}"
    elif cheapest is None:
        yield (
            "advice: use more chips, a shorter --max-seq-length, --optim adafactor, or --precision pure-bf16; weights, "
            "gradients and optimizer are split over fsdp"
        )
    if findings.unanswered and len(findings.outcomes) > 1:
        yield f"not asked for lack of compilations (--max-compilations): {', '.join(findings.unanswered)}"
    if plan.training is not None:
        yield from plan.training.lines()


def _cheapest(plan: Plan) -> Fitted | None:
    fitting = [one for one in plan.findings.outcomes if isinstance(one, Fitted) and plan.fits(one)]
    return min(fitting, key=lambda one: ranking_seconds(one, plan.tpu), default=None)


def _summary(plan: Plan, outcome: Outcome) -> str:
    told = f"{outcome.candidate}: {_gb(outcome.peak_bytes)}"
    if not isinstance(outcome, Fitted) or not plan.fits(outcome):
        return f"{told}, does not fit"
    each = ranking_seconds(outcome, plan.tpu) * outcome.candidate.tokens
    return f"{told}, {_ms(each)} a step by the compiler's estimate for {outcome.candidate.tokens:,} tokens"


def _flags(candidate: Candidate) -> str:
    config, mesh = (
        candidate.config,
        ",".join(f"{axis}={size}" for axis, size in candidate.mesh.by_axis.items() if size > 1),
    )
    return f"--per-device-train-batch-size {candidate.batch} --remat {config.remat}" + (
        f' --mesh "{mesh}"' if mesh else ""
    )


def _accumulation(candidate: Candidate) -> str:
    turns = candidate.config.gradient_accumulation_steps
    return f" x {turns} micro-batches" if turns > 1 else ""


def _largest(outcome: Outcome) -> list[Allocation]:
    pieces = outcome.memory.allocations if isinstance(outcome, Fitted) else outcome.largest
    return list(pieces[:LARGEST_SHOWN])


def _allocation(one: Allocation) -> str:
    shape = one.shape.partition("{")[0]
    return f"{_gb(one.bytes):>10}  {one.kind:<17} {shape:<28} {one.module or '-'} ({one.operation})"


def _collectives(fitted: Fitted) -> dict[str, dict[str, float]]:
    costs = fitted.costs
    return {
        kind: {"count": float(count), "bytes": float(costs.collective_bytes[kind])}
        for kind, count in sorted(costs.collective_count.items())
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": candidate.batch,
        "gradient_accumulation_steps": candidate.config.gradient_accumulation_steps,
        "remat": candidate.config.remat,
        "mesh": {axis: size for axis, size in candidate.mesh.by_axis.items() if size > 1},
    }


def _outcome_json(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    fitted = outcome if isinstance(outcome, Fitted) else None
    return {
        **_candidate_json(outcome.candidate),
        "fits": plan.fits(outcome),
        "peak_hbm_bytes": outcome.peak_bytes,
        "estimated_cycles": fitted.costs.cycles if fitted else None,
        "collective_bytes": fitted.costs.total_collective_bytes if fitted else None,
        "matmul_flops": fitted.costs.matmul_flops if fitted else None,
    }


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.1 else f"{1e3 * seconds:.0f} ms"
