"""gpt-oss from real rows to an answer: Harmony, packed rows, training, export, and generation that knows its end."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from numina_finetune.data.chat import render_prompt
from numina_finetune.data.formats import format_example
from tests.conftest import Run, environment, real_data
from tests.programs import run_module


@pytest.mark.slow  # 201,088 tokens to choose from: minutes on two cores
def test_a_model_trained_on_real_tool_calls_ends_its_turns_as_harmony_does(tmp_path: Path) -> None:
    data, folder = real_data(), tmp_path / "tokenizer"
    folder.mkdir()
    source = data / "tokenizers" / "gpt-oss"
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    shutil.copy(source / "tokenizer_config.json", folder)
    lines = (data / "tir" / "tora_gsm8k_test_70b.jsonl").read_text(encoding="utf-8").splitlines()
    lines = sorted(lines, key=len)[:4]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines * 8), encoding="utf-8")

    config = tmp_path / "run.yaml"
    options = {
        **{"model_name": "tiny-gpt-oss", "tokenizer_name": str(folder), "output_dir": str(tmp_path / "out")},
        **{"datasets": [{"name": str(rows), "format": "numina_tir"}], "cache_dir": str(tmp_path / "cache")},
        **{"max_seq_length": 768, "per_device_train_batch_size": 1, "max_steps": 30, "precision": "fp32"},
        # Thirty steps are to learn the rows by heart.
        **{"learning_rate": 5e-3, "warmup_ratio": 0.1, "save_steps": 0, "logging_steps": 5},
    }
    config.write_text(yaml.safe_dump(options), encoding="utf-8")
    env = environment(USE_TORCH_XLA="false", OMP_NUM_THREADS="2")
    ended = run_module("numina_finetune", "--config", str(config), env=env, together=True)
    run = Run(ended.returncode, ended.stdout, tmp_path / "out")
    assert run.code == 0, run.output
    losses = [record["loss"] for record in run.metrics if "loss" in record]
    assert len(losses) == 30
    assert losses[-1] < losses[0] / 2

    tokenizer = AutoTokenizer.from_pretrained(run.run / "model")
    model = AutoModelForCausalLM.from_pretrained(run.run / "model", dtype=torch.float32)
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|return|>", "<|call|>")}
    assert set(model.generation_config.eos_token_id) == ends
    for line in lines[:2]:
        example = format_example(json.loads(line), format="numina_tir")
        asked = [message for message in example["messages"] if message["role"] == "user"]
        prompt = render_prompt(asked, tokenizer, tools=example["tools"], family="harmony")
        written = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=200)[0]
        assert int(written[-1]) in ends, tokenizer.decode(written)
