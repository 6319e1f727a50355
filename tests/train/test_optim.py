"""Learning-rate schedules, decay groups, AdamW and Adafactor are the ones users know; bf16 weights train as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import Adafactor, get_wsd_schedule

from numina_finetune.config import SCHEDULES, RunConfig
from numina_finetune.train.adamw import AdamW
from numina_finetune.train.optim import guarded_update, learning_rate_at, make_optimizer, parameter_groups
from numina_finetune.train.rounding import stochastic_bf16


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine", {}),
        ("linear", {}),
        ("constant", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.25}),
    ],
)
def test_schedules_have_the_values_of_transformers_after_the_warm_up(name: str, options: dict[str, float]) -> None:
    config = RunConfig(lr_scheduler_type=name, learning_rate=3e-4, warmup_ratio=0.1, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=4,
        num_training_steps=40,
        scheduler_specific_kwargs=dict(options),
    )
    for step in range(40):
        if step >= 4:
            assert learning_rate_at(step, 40, config) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [{}, {"warmup_steps": 4}, {"warmup_ratio": 0.1, "warmup_steps": None}])
def test_no_step_of_the_warm_up_is_spent_at_rate_0(schedule: str, options: dict[str, Any]) -> None:
    config = RunConfig(lr_scheduler_type=schedule, learning_rate=1e-4, **options)
    rates = [learning_rate_at(step, 40, config) for step in range(40)]
    warmup = 4 if options else 2  # 0.03 of 40, rounded up
    assert rates[:warmup] == pytest.approx([1e-4 * (step + 1) / warmup for step in range(warmup)])
    assert min(rates) > 0 and rates[warmup] == pytest.approx(1e-4)


def test_warm_up_steps_override_the_ratio_and_0_of_them_is_no_warm_up() -> None:
    assert learning_rate_at(0, 1000, RunConfig(warmup_ratio=0.5, warmup_steps=10)) == pytest.approx(2e-6)
    assert learning_rate_at(0, 1000, RunConfig(warmup_steps=0)) == pytest.approx(2e-5)


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
        if step >= 4:
            assert learning_rate_at(step, 40, config) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step()


# --- AdamW ------------------------------------------------------------------------------------------------------------


def sparse_gradients(shape: tuple[int, ...], steps: int) -> Iterator[torch.Tensor]:
    """Of very different sizes, a third of the elements 0, and the first rows not seen in the first half."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        gradient = torch.randn(shape, generator=generator)
        gradient *= 10.0 ** torch.randint(-4, 1, shape, generator=generator)
        gradient[torch.rand(shape, generator=generator) < 0.33] = 0
        if step < steps // 2:
            gradient[:8] = 0
        yield gradient


def test_adamw_is_that_of_torch_over_100_steps_with_zeros_among_the_gradients() -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) * 0.1
    mine, theirs = ({"w.weight": torch.nn.Parameter(weight.clone())} for _ in range(2))
    ours = make_optimizer(mine, RunConfig(weight_decay=0.1))
    assert isinstance(ours, AdamW)
    peer = torch.optim.AdamW(theirs.values(), weight_decay=0.1, foreach=False)
    for step, gradient in enumerate(sparse_gradients((32, 48), 100)):
        rate = 1e-3 * min(1.0, (step + 1) / 10)
        mine["w.weight"].grad, theirs["w.weight"].grad = gradient.clone(), gradient.clone()
        guarded_update(ours, torch.tensor(rate), torch.tensor(True))
        peer.param_groups[0]["lr"] = rate
        peer.step()
    torch.testing.assert_close(mine["w.weight"], theirs["w.weight"], rtol=0, atol=1e-7)
    for key in ("exp_avg", "exp_avg_sq"):
        both = ours.state[mine["w.weight"]][key], peer.state[theirs["w.weight"]][key]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("optim", ["adamw", "adafactor"])
def test_a_step_at_rate_0_moves_nothing_also_where_the_gradient_is_0(optim: str) -> None:
    named = {"w.weight": torch.nn.Parameter(torch.ones(2, 3))}
    optimizer = make_optimizer(named, RunConfig(optim=optim))
    named["w.weight"].grad = torch.tensor([[1.0, 0.0, 1e-3], [0.0, 0.0, 0.0]])
    guarded_update(optimizer, torch.tensor(0.0), torch.tensor(True))
    assert torch.equal(named["w.weight"].detach(), torch.ones(2, 3))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optim", ["adamw", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_that_is_left_out_changes_nothing_the_step_count_included(
    dtype: torch.dtype, optim: str, fused: bool
) -> None:
    named = {"w.weight": torch.nn.Parameter(torch.randn(4, 6).to(dtype))}
    optimizer = make_optimizer(named, RunConfig(optim=optim), fused=fused)
    state = optimizer.state[named["w.weight"]]
    for applied in (True, False):
        before = [named["w.weight"].detach().clone(), *(tensor.clone() for tensor in state.values())]
        named["w.weight"].grad = torch.full((4, 6), 1.0 if applied else torch.nan, dtype=dtype)
        guarded_update(optimizer, 1e-2, torch.tensor(applied))
        after = [named["w.weight"].detach(), *state.values()]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True)) is not applied


# --- bf16 weights -----------------------------------------------------------------------------------------------------


def test_stochastic_rounding_keeps_the_mean_and_takes_a_neighbour() -> None:
    value, step = torch.full((1 << 18,), 0.0123456), torch.tensor(3.0)
    rounded = stochastic_bf16(value, step, 7)
    assert set(rounded.tolist()) == {0.0123291015625, 0.01239013671875}
    assert rounded.float().mean().item() == pytest.approx(0.0123456, rel=2e-5)
    assert torch.equal(stochastic_bf16(-value, step, 7), -rounded)
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf])
    assert torch.equal(stochastic_bf16(exact, step, 7).float(), exact)


def test_what_is_rounded_up_depends_on_seed_step_parameter_and_element_alone() -> None:
    value, step = torch.rand(64, 32), torch.tensor(3.0)
    rounded = stochastic_bf16(value, step, 7)
    assert torch.equal(rounded, stochastic_bf16(value, step, 7))
    parts = [stochastic_bf16(part, step, 7, begin=16 * 32 * number) for number, part in enumerate(value.split(16))]
    assert torch.equal(torch.cat(parts), rounded)
    for other in (stochastic_bf16(value, step + 1, 7), stochastic_bf16(value, step, 8)):
        assert 0.2 < (other != rounded).float().mean() < 0.5


def test_bf16_weights_move_as_fp32_ones_at_the_rates_of_fine_tuning() -> None:
    """400 steps at 1e-5: rounded to the nearest, 15% of such weights ever move."""
    weight = (torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    generator, moved = torch.Generator().manual_seed(2), {}
    drift = torch.randn(64, 64, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        named = {"w.weight": torch.nn.Parameter(weight.clone().to(dtype))}
        optimizer, noise = make_optimizer(named, RunConfig()), torch.Generator().manual_seed(3)
        for _ in range(400):
            named["w.weight"].grad = (drift + torch.randn(64, 64, generator=noise)).to(dtype)
            guarded_update(optimizer, 1e-5, torch.tensor(True))
        moved[dtype] = named["w.weight"].detach().float() - weight.float()
    exact, rounded = moved[torch.float32], moved[torch.bfloat16]
    assert (rounded != 0).float().mean() > 0.9
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.95
    assert (rounded.norm() / exact.norm()).item() == pytest.approx(1.0, abs=0.1)


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
