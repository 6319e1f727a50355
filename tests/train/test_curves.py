"""Which steps are reported as standing out, also across lives, and what is said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from numina_finetune.train.curves import Curves
from numina_finetune.train.metrics import Record, parse_metrics
from numina_finetune.train.spikes import FEWEST, WINDOW, SpikeWatch


def falling(steps: int, noise: float = 0.1) -> list[float]:
    """A loss that falls from 3 to 1, noisy by a share of itself."""
    random = np.random.default_rng(0).normal(0, noise, steps)
    return [float((1 + 2 * math.exp(-step / 100)) * math.exp(random[step])) for step in range(steps)]


def standing_out(losses: Iterable[float], norms: Iterable[float], factor: float = 5.0) -> list[int]:
    watch = SpikeWatch(factor)
    found = [watch.look(loss, norm) for loss, norm in zip(losses, norms, strict=True)]
    return [number for number, spike in enumerate(found) if spike]


def test_a_noisy_falling_curve_has_none() -> None:
    assert standing_out(falling(2000), falling(2000, 0.3)) == []


@pytest.mark.parametrize("at", [FEWEST, 60, 900])
def test_one_loss_or_norm_far_above_the_usual_is_found_and_nothing_after_it(at: int) -> None:
    calm, shaken = falling(1000, 0.05), falling(1000, 0.05)
    shaken[at] *= 2.5
    assert standing_out(shaken, calm) == standing_out(calm, shaken) == [at]
    assert standing_out(shaken, calm, factor=0.0) == []


def test_what_stays_becomes_the_usual() -> None:
    found = standing_out([1.0] * 300 + [3.0] * 300, [1.0] * 600)
    assert found[0] == 300 and len(found) <= WINDOW // 2 + 1


def test_values_that_are_not_finite_say_nothing_of_what_is_usual() -> None:
    assert standing_out([1.0] * 50 + [math.nan] * 200 + [1.0, 3.0], [1.0] * 252) == [251]


def records(losses: Iterable[float]) -> list[Record]:
    return [
        {"step": step, "loss": loss, "grad_norm": 1.0, "gradient_signal": 1.0, "gradient_noise": step, "life": 1}
        for step, loss in enumerate(losses, start=1)
    ]


def follow(curves: Curves, steps: Iterable[Record]) -> list[dict[str, Any]]:
    """All records that the steps leave."""
    return [record for step in steps for record in curves.take(step, 8 * (step["step"] - 1)) if record]


def test_a_later_life_finds_what_a_life_never_stopped_finds() -> None:
    losses = falling(200, 0.05)
    losses[29] *= 3  # in the first life, and again in the second
    losses[131] *= 3
    whole, first, second = (Curves(8, 5.0) for _ in range(3))
    straight = follow(whole, records(losses))
    stopped = follow(first, records(losses)[:125])
    second.resume(parse_metrics("".join(json.dumps(record) + "\n" for record in stopped)))
    assert stopped + follow(second, records(losses)[125:]) == straight
    spikes = [record for record in straight if "spike" in record]
    assert [(record["step"], record["spike"]["rows"]) for record in spikes] == [(30, [232, 239]), (132, [1048, 1055])]
    assert second.summary == whole.summary and "2 (30, 132)" in str(whole.summary)


def test_a_resume_at_a_changed_loss_raises_no_false_alarm() -> None:
    """As by another mesh's rounding, or other data."""
    curves = Curves(8, 5.0)
    curves.resume(parse_metrics("".join(json.dumps(record) + "\n" for record in records(falling(100)))))
    assert not [record for record in follow(curves, records([2.0] * 50)) if "spike" in record]
    assert curves.summary is None


def test_steps_that_stand_out_one_after_the_other_get_one_line_with_its_rows() -> None:
    curves = Curves(8, 5.0)
    found = [record for record in follow(curves, records([1.0] * 40 + [4.0, 4.5] + [1.0] * 10)) if "spike" in record]
    lines = [curves.told(record) for record in found]
    assert lines[1] is None
    for part in ("step 41 stands out", "loss 4.0000 (usual: 1.0000)", "rows 320 to 327"):
        assert part in str(lines[0])


def test_a_skipped_step_is_no_part_of_the_curves() -> None:
    steps = [{**record, "applied": record["step"] != 45} for record in records([1.0] * 44 + [9.0] + [1.0])]
    assert not [record for record in follow(Curves(8, 5.0), steps) if "spike" in record]
