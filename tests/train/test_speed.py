"""What a log line says of speed is what the formulas say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3Config

from numina_finetune.train.speed import Chips, TokenFlops, token_flops, utilisation
from tests.conftest import environment, train


@pytest.mark.parametrize("tied", [True, False])
def test_a_tokens_flops_count_what_multiplies_it(tied: bool) -> None:
    config = Qwen3Config(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        flops = token_flops(AutoModelForCausalLM.from_config(config), length=9)
    layer = 16 * (32 + 16 + 16) + 32 * 16 + 3 * 16 * 32 + 2 * 16 + 2 * 8
    assert flops.products == 6 * (2 * layer + 16 + 100 * 16)
    assert flops.attention == 2 * 12 * 4 * 8 * 5, "nine places see five keys on average"


def test_frozen_weights_have_no_gradients_to_count() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(num_hidden_layers=1))
        trained = token_flops(model, length=4)
        frozen = token_flops(model.requires_grad_(False), length=4)
    assert frozen.products == trained.products * 4 / 6


def test_experts_count_by_the_share_that_a_token_is_sent_to_and_windows_by_their_keys() -> None:
    config = GptOssConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=2,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        flops = token_flops(model, length=4)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    others = sum(p.numel() for p in model.parameters()) - experts - 100 * 16
    assert flops.products == 6 * (others + experts / 4)
    assert flops.attention == 12 * 16 * (1 + 2 + 2 + 2) / 4 + 12 * 16 * 2.5


def test_utilisation_is_of_all_chips_peak_and_absent_where_that_is_unknown() -> None:
    flops = TokenFlops(products=600.0, attention=200.0)
    assert utilisation(flops, 10.0, Chips(4, 3000.0)) == {"mfu": 0.5, "mfu_with_attention": 0.6667}
    assert utilisation(flops, 10.0, Chips(4, None)) == {}


@pytest.mark.parametrize(("devices", "ending"), [(None, ".pt.trace.json"), (2, ".xplane.pb")])
def test_a_profile_of_the_steps_asked_for_and_where_time_went_are_in_the_runs_folder(
    tmp_path: Path, devices: int | None, ending: str
) -> None:
    run = train(
        tmp_path / "out",
        *("--max-steps", "4", "--logging-steps", "2", "--save-steps", "0", "--profile-steps", "2-3"),
        env=environment(devices=devices),
    )
    assert run.code == 0, run.output
    profiles = [path for path in (run.run / "profile").rglob("*") if path.name.endswith(ending)]
    assert len(profiles) == 1 and profiles[0].stat().st_size > 1000
    record = next(record for record in run.metrics if record["step"] == 4 and "loss" in record)
    assert record["tokens_per_second_per_chip"] == pytest.approx(record["tokens_per_second"] / (devices or 1), abs=0.1)
    parts = record["seconds_input"] + record["seconds_dispatch"] + record["seconds_wait"]
    assert 0 < parts <= record["seconds_per_step"] * 1.01 + 1e-3, json.dumps(record)
    assert "mfu" not in record, "a CPU has no peak in the table"
    if devices:
        assert "training-graph compilations: 1; host reads between log lines: 0" in run.output
