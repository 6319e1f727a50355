"""Attention of packed segments by themselves is attention under one mask over all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from numina_finetune.data.loader import Batch
from numina_finetune.errors import ConfigError
from numina_finetune.models.experts import STATIC_EXPERTS
from numina_finetune.torch_native.attention import attention_for, flash_attention, use_attention
from numina_finetune.torch_native.batches import Segments, on_device
from numina_finetune.train.loss import CausalLoss
from tests.reference import fill_randomly, gpt_oss_config, packed_rows, qwen3_config, reference

CPU = torch.device("cpu")
CONFIGS = {"windows": qwen3_config(2), "sinks and windows": gpt_oss_config(4)}


def rows() -> Batch:
    return Batch(**{name: tensor.numpy() for name, tensor in packed_rows().items()})


@pytest.mark.parametrize("fixed_shape", [False, True], ids=["without padding", "with padding"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_have_the_loss_and_gradients_of_their_sequences_alone(name: str, fixed_shape: bool) -> None:
    config: PretrainedConfig = CONFIGS[name]
    experts = {"experts_implementation": STATIC_EXPERTS} if config.model_type == "gpt_oss" else {}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **experts)
    fill_randomly(model)
    use_attention(model.config, "segments")
    loss = CausalLoss(model)(**on_device(rows(), CPU, fixed_shape=fixed_shape))
    torch.autograd.backward(loss)
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected, gradients = reference(model, packed_rows())
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5)


def test_padding_and_tokens_without_loss_are_not_computed() -> None:
    packed = rows()
    placed = on_device(packed, CPU, fixed_shape=False)
    tokens = int((packed.segment_ids > 0).sum())
    assert placed["input_ids"].shape == (1, tokens)
    assert sum(placed["segments"].lengths) == tokens
    assert len(placed["supervised"]) == int((packed.labels != -100).sum())


def test_a_micro_batch_of_padding_alone_has_no_loss() -> None:
    model = AutoModelForCausalLM.from_config(qwen3_config(2), dtype=torch.float32)
    use_attention(model.config, "segments")
    empty = Batch(*(np.full((2, 16), value, np.int32) for value in (0, -100, 0, 0)))
    loss = CausalLoss(model)(**on_device(empty, CPU, fixed_shape=False))
    torch.autograd.backward(loss)
    assert loss.item() == 0.0
    assert all(float(p.grad.abs().max()) == 0.0 for p in model.parameters() if p.grad is not None)


def test_the_flash_kernel_takes_what_it_is_given_and_gives_gradients() -> None:
    """Shapes and types only, by torch's description of the kernel: there is no GPU to run it."""
    states = [
        torch.empty(2, heads, 64, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (8, 4, 4)
    ]
    segments = Segments((64, 30, 34), torch.empty(4, device="meta", dtype=torch.int32))
    attended, _ = flash_attention(torch.nn.Module(), *states, None, segments=segments, sliding_window=9)
    assert attended.shape == (2, 64, 8, 64)
    torch.autograd.backward(attended.sum())
    assert all(state.grad is not None and state.grad.shape == state.shape for state in states)


def test_flash_attention_is_refused_where_it_cannot_be() -> None:
    config = gpt_oss_config(4)
    assert attention_for("auto", config, CPU, torch.bfloat16) == "segments"
    with pytest.raises(ConfigError, match=r"--attention flash needs a GPU .*bf16 only.*no attention sinks"):
        attention_for("flash", config, CPU, torch.float32)
