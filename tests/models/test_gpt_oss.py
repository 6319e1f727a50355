"""gpt-oss as it is trained here, beside plain transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from numina_finetune.config import RunConfig
from numina_finetune.models.attention import SEGMENT_ATTENTION, segment_mask
from numina_finetune.models.builtin import TINY_TOKENIZER
from numina_finetune.models.experts import STATIC_EXPERTS
from numina_finetune.models.load import load_model
from numina_finetune.models.precision import apply_precision
from numina_finetune.train.loss import CausalLoss
from tests.reference import SEGMENTS, Batch, fill_randomly, gpt_oss_config, packed_rows, reference


def small(experts: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(
        gpt_oss_config(experts),
        dtype=dtype,
        attn_implementation=SEGMENT_ATTENTION,
        experts_implementation=STATIC_EXPERTS,
    )
    fill_randomly(model)
    return model


def ours(model: PreTrainedModel, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = CausalLoss(model)(**batch)
    torch.autograd.backward(loss)
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("experts", [8, 32])
def test_packed_rows_have_the_loss_and_gradients_that_transformers_has_for_their_sequences(experts: int) -> None:
    batch = packed_rows()
    loss, gradients = ours(small(experts), batch)
    expected, references = reference(small(experts), batch)
    assert loss == pytest.approx(expected, rel=5e-6)
    assert gradients.keys() == references.keys() and any("sinks" in name for name in gradients)
    for name, gradient in references.items():
        assert (gradients[name] - gradient).norm() / gradient.norm() < 1e-5, name


def test_a_window_reaches_as_many_keys_back_as_transformers_lets_it() -> None:
    """One key more or less changes the loss by far more than the agreement above allows."""
    batch, losses = packed_rows(), {}
    for window in (8, 9, 10):
        model = small(8)
        model.model.layers[0].self_attn.sliding_window = window
        losses[window] = CausalLoss(model)(**batch).item()
    expected, _ = reference(small(8), batch)
    assert losses[9] == pytest.approx(expected, rel=5e-6)
    assert all(abs(losses[window] / expected - 1) > 1e-4 for window in (8, 10))
    assert segment_mask(torch.ones(1, 300), 128).sum(-1).max() == 128


def test_what_a_token_gets_does_not_depend_on_the_sequences_beside_it() -> None:
    model, batch = small(8).eval(), packed_rows()
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    start, end = SEGMENTS[1:3]
    alone = {name: tensor[:, start:end] for name, tensor in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits[:, start:end], model(**alone).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "pure-bf16"])
def test_the_router_chooses_in_fp32_while_the_rest_computes_in_bf16(precision: str) -> None:
    model = small(8, torch.float32 if precision == "bf16" else torch.bfloat16)
    apply_precision(model, precision)
    seen: list[torch.Tensor] = []
    router, experts = model.model.layers[1].mlp.router, model.model.layers[1].mlp.experts
    router.register_forward_hook(lambda module, arguments, output: seen.extend((*arguments, *output[:2])))
    experts.register_forward_hook(lambda module, arguments, output: seen.extend((arguments[0], output)))
    loss, _ = ours(model, packed_rows())
    assert [tensor.dtype for tensor in seen] == [torch.float32] * 3 + [torch.bfloat16] * 2
    masters = {parameter.dtype for parameter in model.parameters()}
    assert masters == {torch.float32 if precision == "bf16" else torch.bfloat16}
    assert loss == pytest.approx(ours(small(8), packed_rows())[0], rel=2e-2)


def test_experts_take_the_same_shapes_whatever_the_routing() -> None:
    """Seen in what autograd keeps: nothing has a size of its own."""
    shapes = []
    for favourite in (0, 5):
        experts = small(8).model.layers[0].mlp.experts
        choice = torch.arange(favourite, favourite + 4).remainder(8).expand(16, 4)
        kept: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(tuple(t.shape)), lambda t: t):
            experts(torch.randn(16, 64), choice, torch.full((16, 4), 0.25))
        shapes.append(kept)
    assert shapes[0] == shapes[1]


def test_the_built_in_gpt_oss_is_loaded_ready_for_training() -> None:
    config = RunConfig(model_name="tiny-gpt-oss", precision="fp32")
    model = load_model(config, AutoTokenizer.from_pretrained(str(TINY_TOKENIZER)))
    implementations = model.config._attn_implementation, model.config._experts_implementation
    assert implementations == (SEGMENT_ATTENTION, STATIC_EXPERTS)
