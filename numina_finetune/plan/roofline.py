"""The least time that a step can take, by what it computes, reads and sends: a bound, not a prediction."""

from __future__ import annotations

from dataclasses import dataclass

from numina_finetune.plan.compilation import Fitted
from numina_finetune.tpu import Slice


@dataclass(frozen=True)
class Bound:
    """Seconds of one optimizer step that no schedule can save, each as if the other two cost nothing."""

    compute: float
    """All products, kernels' too where they state theirs, at the chip's peak rate."""
    memory: float
    """What instructions read and write, each array once, at the memory's full rate."""
    interconnect: float
    """What collectives move, over all links at once."""

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def limited_by(self) -> str:
        return max(("compute", "memory", "interconnect"), key=lambda term: float(getattr(self, term)))


def bound_of(fitted: Fitted, tpu: Slice) -> Bound:
    """The three terms of a compiled step."""
    costs, chip = fitted.costs, tpu.chip
    moved = costs.total_collective_bytes
    return Bound(
        (costs.matmul_flops + costs.kernel_flops) / chip.bf16_flops,
        costs.hbm_bytes / chip.hbm_bandwidth,
        moved / tpu.interconnect if tpu.interconnect else 0.0,
    )


def model_flops(fitted: Fitted) -> float:
    """6·N·tokens of one step for each chip, N being the parameters that a token meets; attention is left out.

    Frozen parameters count 4: their own gradients are never made.
    """
    return fitted.token_flops * fitted.candidate.tokens / fitted.candidate.mesh.devices


def ranking_seconds(fitted: Fitted, tpu: Slice) -> float:
    """What candidates are compared by, for each token: the compiler's own estimate of its instructions, kernels at the
    chip's peak, and collectives where these take longer."""
    costs, chip = fitted.costs, tpu.chip
    working = costs.cycles / chip.clock_hz + costs.kernel_flops / chip.bf16_flops
    return max(working, bound_of(fitted, tpu).interconnect) / fitted.candidate.tokens
