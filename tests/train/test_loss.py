"""The loss is the cross-entropy of the full logits, and packing does not change it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from numina_finetune.config import SourceConfig
from numina_finetune.data.dataset import IndexOptions, build_index
from numina_finetune.data.loader import Loader
from numina_finetune.models.attention import SEGMENT_ATTENTION
from numina_finetune.models.builtin import TINY_TOKENIZER, tiny_config
from numina_finetune.train import loss as loss_module
from numina_finetune.train.loss import CausalLoss, linear_cross_entropy
from tests.conftest import real_data


@pytest.mark.parametrize("chunk_elements", [2**26, 7 * 50 * 3])
def test_chunked_loss_and_gradients_equal_those_of_the_full_logits(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_elements)
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 20, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (3, 20), dtype=torch.int32)
    labels[:, ::3] = -100

    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels) / 7, (hidden, weight))
    expected_loss = torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), labels.long().flatten(), reduction="sum"
    )
    expected = torch.autograd.grad(expected_loss / 7, (hidden, weight))

    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), expected_loss, rtol=1e-5, atol=1e-4)
    for gradient, reference in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_one_over_n_is_not_rounded_to_the_compute_type() -> None:
    """In bf16 1/1370 is 0.195 % too small, alike for all tokens; the weight's gradient would be right."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((2, 20, 16), (50, 16)))
    labels = torch.randint(0, 50, (2, 20), dtype=torch.int32)
    loss = linear_cross_entropy(hidden, weight, labels)
    plain = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    scaled = torch.autograd.grad(loss * torch.tensor(1 / 1370), hidden)[0]
    assert scaled.equal((plain.float() * torch.tensor(1 / 1370)).to(torch.bfloat16))


def test_a_batch_without_any_supervised_token_has_no_loss_and_no_gradient() -> None:
    hidden, weight = torch.randn(1, 4, 8, requires_grad=True), torch.randn(10, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((1, 4), -100, dtype=torch.int32))
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.fixture
def model() -> PreTrainedModel:
    return _tiny_model(AutoTokenizer.from_pretrained(str(TINY_TOKENIZER)))


def test_our_loss_equals_the_one_transformers_computes_from_labels(model: PreTrainedModel) -> None:
    ids = torch.randint(5, 200, (2, 24), dtype=torch.int32)
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100, dtype=torch.int32)], dim=1)
    ours = CausalLoss(model)(ids, labels, torch.ones_like(ids), torch.arange(24, dtype=torch.int32).expand(2, -1))
    model.set_attn_implementation("sdpa")
    theirs = model(input_ids=ids.long(), labels=ids.long()).loss
    torch.testing.assert_close(ours / 46, theirs, rtol=1e-5, atol=1e-6)


def test_packed_rows_have_the_loss_and_gradient_of_their_sequences_alone_on_real_gsm8k(tmp_path: Path) -> None:
    data = real_data()
    tokenizer = AutoTokenizer.from_pretrained(str(data / "tokenizers" / "qwen3"))
    rows = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(rows) + "\n", encoding="utf-8")
    options = IndexOptions(max_seq_length=320)
    index = build_index([SourceConfig(str(source), format="gsm8k")], tokenizer, options, tmp_path / "cache")
    model = _tiny_model(tokenizer)

    results = {}
    for packing in (True, False):
        loader = Loader(index, seq_len=320, packing=packing, seed=0, pad_id=tokenizer.pad_token_id)
        results[packing] = _summed_loss_and_gradients(model, loader)
    assert results[True][2] < results[False][2], "packing saved no row: nothing was compared"

    assert results[True][0] == pytest.approx(results[False][0], rel=5e-6)
    for name, gradient in results[True][1].items():
        reference = results[False][1][name]
        assert (gradient - reference).norm() / reference.norm() < 1e-5, name


def _summed_loss_and_gradients(model: PreTrainedModel, loader: Loader) -> tuple[float, dict[str, torch.Tensor], int]:
    model.zero_grad()
    total, rows = 0.0, loader.rows_per_epoch
    for first in range(0, rows, 4):
        batch = loader.batch(first, 4, rows)
        loss = CausalLoss(model)(**{name: torch.from_numpy(np.array(a)) for name, a in batch._asdict().items()})
        torch.autograd.backward(loss)
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, rows


def _tiny_model(tokenizer: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config("tiny-qwen3", tokenizer)  # type: ignore[arg-type]
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=SEGMENT_ATTENTION)
