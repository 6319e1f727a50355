"""Learning-rate schedules, decay groups and Adafactor are the ones users know."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import Adafactor, get_wsd_schedule

from numina_finetune.config import RunConfig
from numina_finetune.train.optim import learning_rate_at, make_optimizer, parameter_groups


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


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5])
def test_the_warm_up_stable_decay_schedule_has_the_values_of_transformers(ratio: float) -> None:
    config = RunConfig(lr_scheduler_type="wsd", learning_rate=3e-4, warmup_ratio=0.1, lr_decay_ratio=ratio)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    decay = round(40 * ratio)
    theirs = get_wsd_schedule(optimizer, 4, decay, num_training_steps=40, decay_type="linear")
    for step in range(40):
        assert learning_rate_at(step, 40, config) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step()


# --- Adafactor --------------------------------------------------------------------------------------------------------

SHAPES = {"matrix.weight": (6, 10), "experts.down_proj": (3, 5, 4), "norm.weight": (7,), "experts.bias": (3, 5)}


def trained(
    make: Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer],
    shapes: dict[str, tuple[int, ...]],
    steps: int,
) -> list[dict[str, torch.Tensor]]:
    """The parameters before the first step and after each, all optimizers being given the same gradients."""
    generator = torch.Generator().manual_seed(0)
    named = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    optimizer, found = make(named), []
    for step in range(steps + 1):
        found.append({name: p.detach().clone() for name, p in named.items()})
        for parameter in named.values():
            # Of very different sizes, so that updates are clipped in some steps.
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (step % 3)
        optimizer.step()
    return found


def ours(rate: float, **values: float) -> Callable[[dict[str, torch.nn.Parameter]], torch.optim.Optimizer]:
    def make(named: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = make_optimizer(named, RunConfig(optim="adafactor", **values))  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            group["lr"] = rate
        return optimizer

    return make


def test_adafactor_is_that_of_transformers_at_a_given_rate() -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "experts.bias"}  # theirs goes by dimensions

    def theirs(named: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        decays = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in named.values()]
        return Adafactor(decays, lr=1e-2, scale_parameter=False, relative_step=False)

    both = zip(trained(ours(1e-2, weight_decay=0.1), shapes, 6), trained(theirs, shapes, 6), strict=True)
    for mine, other in both:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_adafactors_directions_are_those_of_torch_which_scales_them_by_the_parameter() -> None:
    shapes = {"matrix.weight": (6, 10), "norm.weight": (7,)}
    rate = 1e-2
    mine = trained(ours(rate), shapes, 6)
    theirs = trained(lambda named: torch.optim.Adafactor(named.values(), lr=rate, weight_decay=0.0), shapes, 6)
    for step in range(6):
        for name in shapes:
            scale = theirs[step][name].square().mean().sqrt()  # its rate is below 1 / sqrt(t) in all these steps
            their_update = (theirs[step + 1][name] - theirs[step][name]) / (rate * scale)
            torch.testing.assert_close(
                (mine[step + 1][name] - mine[step][name]) / rate, their_update, rtol=1e-3, atol=1e-4
            )


def test_a_stack_of_layers_is_updated_as_its_layers_would_be() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(3, 4, 5, generator=generator) * torch.tensor([0.1, 1.0, 30.0])[:, None, None]

    def update(named: dict[str, torch.nn.Parameter], stacks: list[str]) -> None:
        optimizer = make_optimizer(named, RunConfig(optim="adafactor"), stacks=stacks)
        for _ in range(3):
            for name, parameter in named.items():
                parameter.grad = gradients if stacks else gradients[int(name[-1])]
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            optimizer.step()

    stacked = {"layers": torch.nn.Parameter(torch.ones(3, 4, 5))}
    apart = {f"layers.{number}": torch.nn.Parameter(torch.ones(4, 5)) for number in range(3)}
    update(stacked, ["layers"])
    update(apart, [])
    torch.testing.assert_close(stacked["layers"].detach(), torch.stack([p.detach() for p in apart.values()]))


def test_adafactor_keeps_less_than_a_tenth_of_adamws_state_and_all_of_it_from_the_start() -> None:
    named = {"w": torch.nn.Parameter(torch.zeros(256, 512)), "frozen": torch.nn.Parameter(torch.zeros(2), False)}
    sizes = {}
    for optim in ("adamw", "adafactor"):
        (state,) = make_optimizer(named, RunConfig(optim=optim)).state.values()
        sizes[optim] = sum(tensor.numel() for tensor in state.values())
    assert sizes == {"adamw": 2 * 256 * 512 + 1, "adafactor": 256 + 512 + 1}
