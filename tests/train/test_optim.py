"""Learning-rate schedules and decay groups are the ones users know."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from numina_finetune.config import RunConfig
from numina_finetune.train.optim import learning_rate_at, parameter_groups


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_have_the_values_of_transformers(name: str) -> None:
    config = RunConfig(lr_scheduler_type=name, learning_rate=3e-4, warmup_ratio=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name, optimizer, num_warmup_steps=4, num_training_steps=40
    )
    for step in range(40):
        assert learning_rate_at(step, 40, config) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step()


def test_matrices_decay_and_norms_and_biases_do_not() -> None:
    shapes = {"w": (2, 2), "b": (2,), "experts.down_proj": (2, 2, 2), "experts.down_proj_bias": (2, 2)}
    named = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    decays = {id(p): group["weight_decay"] for group in parameter_groups(named, 0.1) for p in group["params"]}
    assert decays == {id(named[name]): decay for name, decay in zip(shapes, (0.1, 0.0, 0.1, 0.0), strict=True)}
