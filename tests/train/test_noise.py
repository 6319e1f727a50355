"""The gradient noise scale, where the gradient and its noise are known."""

from __future__ import annotations

import pytest
import torch

from numina_finetune.train.noise import FEWEST, WINDOW, NoiseScale, signal_and_noise
from numina_finetune.train.step import total_norm


def scale_of(noise: float, *, steps: int, clip: float = float("inf"), beta: float = 0.9) -> float | None:
    """Batches, as estimated from gradients that all have length 1 and Gaussian noise of squared length ``noise``."""
    generator = torch.Generator().manual_seed(0)
    shapes = (40, 50), (500,)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    size = sum(parameter.numel() for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(beta, 0.999))
    scale = NoiseScale()
    for _ in range(steps):
        for parameter in parameters:
            random = torch.randn(parameter.shape, generator=generator)
            parameter.grad = (1 + noise**0.5 * random) / size**0.5
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        signal, of_step = signal_and_noise(optimizer, norm.clamp(max=clip), lambda t: total_norm(t, None)).tolist()
        if signal == signal:
            scale.add(signal, of_step)
    return scale.batches


@pytest.mark.parametrize("noise", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("clip", [float("inf"), 0.5])
def test_the_scale_is_the_noise_over_the_squared_gradient_with_and_without_clipping(noise: float, clip: float) -> None:
    assert scale_of(noise, steps=WINDOW, clip=clip) == pytest.approx(noise, rel=0.1)


def test_the_first_steps_count_as_much_as_any_although_the_moment_is_young() -> None:
    assert scale_of(1.0, steps=FEWEST + 1, beta=0.99) == pytest.approx(1.0, rel=0.2)


def test_nothing_is_told_of_few_steps_or_where_the_noise_hides_the_gradient() -> None:
    assert scale_of(1.0, steps=FEWEST) is None, "the first step gives no estimate"
    hidden = NoiseScale()
    for _ in range(FEWEST):
        hidden.add(-0.1, 5.0)
    assert hidden.batches is None
