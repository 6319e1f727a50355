"""Adapters are PEFT's own in what they compute, in what is trained and stored, and in the files that a run leaves."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, Qwen3Config

from numina_finetune import cli
from numina_finetune.checkpoint.reading import committed
from numina_finetune.config import RunConfig
from numina_finetune.data.loader import Batch
from numina_finetune.errors import ConfigError
from numina_finetune.models.attention import SEGMENT_ATTENTION
from numina_finetune.models.builtin import TINY_TOKENIZER
from numina_finetune.models.experts import STATIC_EXPERTS
from numina_finetune.models.load import load_config, load_model
from numina_finetune.models.lora import add_adapters, merged
from numina_finetune.models.precision import apply_precision
from numina_finetune.storage import open_store
from numina_finetune.torch_native.backend import NativeBackend
from numina_finetune.train.loss import CausalLoss
from tests.conftest import Run, environment, train
from tests.reference import (
    LORA,
    VOCABULARY,
    WINDOW,
    fill_randomly,
    gpt_oss_config,
    packed_rows,
    peft_reference,
    with_adapters,
)
from tests.xla.test_checkpoints import go_back

QWEN3 = Qwen3Config(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    use_sliding_window=True,
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention"],
    use_cache=False,
)
MODELS: dict[str, PretrainedConfig] = {"qwen3": QWEN3, "gpt-oss": gpt_oss_config(8)}
TOKENIZER = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))


def small(name: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(MODELS[name]), attn_implementation=SEGMENT_ATTENTION, experts_implementation=STATIC_EXPERTS
    )
    fill_randomly(model)
    return model


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_adapted_models_have_the_loss_and_gradients_that_peft_gives_them(name: str) -> None:
    model, batch = small(name), packed_rows()
    names = with_adapters(model)
    expected, references = peft_reference(small(name), model, names, batch)
    loss = CausalLoss(model)(**batch)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(expected, rel=5e-6)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == references.keys() == names.keys()
    for name, gradient in references.items():
        assert (gradients[name] - gradient).norm() / gradient.norm() < 1e-5, name


@pytest.mark.parametrize("name", MODELS)
def test_new_adapters_change_nothing_and_start_as_the_seed_says(name: str) -> None:
    model, batch = small(name), packed_rows()
    before = CausalLoss(model)(**batch)
    values = {own: model.get_parameter(own).detach() for own in add_adapters(model, LORA)}
    assert torch.equal(CausalLoss(model)(**batch), before)
    for own, value in values.items():
        largest, bound = value.abs().max(), 1 / math.sqrt(value.shape[1]) if "lora_A" in own else 0.0
        assert 0.9 * bound <= largest <= bound, own
    frozen_in_bf16 = small(name).bfloat16()
    add_adapters(frozen_in_bf16, replace(LORA, precision="bf16"))
    assert all(torch.equal(frozen_in_bf16.get_parameter(own), value) for own, value in values.items()), "not rounded"


def test_an_adapter_is_merged_in_fp32_and_rounded_once() -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(6, 10).bfloat16(), torch.randn(2, 10), torch.randn(6, 2)
    expected = (weight.double() + 0.5 * b.double() @ a.double()).bfloat16()
    assert torch.equal(merged(weight, a, b, 0.5, torch.bfloat16), expected)


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "trained"), [("bf16", torch.float32), ("pure-bf16", torch.bfloat16)])
def test_frozen_weights_are_bf16_and_only_adapters_have_moments(
    tmp_path: Path, native_here: None, precision: str, trained: torch.dtype
) -> None:
    config = RunConfig(model_name="tiny-gpt-oss", lora_rank=4, precision=precision, output_dir=str(tmp_path))
    model = load_model(config, TOKENIZER)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, trained), (False, torch.bfloat16)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backend = NativeBackend(config)
    backend.place(model, config)
    rows = Batch(**{name: tensor[:2, :32].int().numpy() for name, tensor in packed_rows().items()})
    for _ in range(2):
        backend.step([backend.put_batch(rows)], 1e-2)
    moments = [state["exp_avg"] for state in backend._optimizer.state.values()]
    adapters = {name for name in before if "lora_" in name}
    assert len(moments) == len(adapters) and {moment.dtype for moment in moments} == {torch.float32}
    moved = {name for name, p in backend._parameters.items() if not torch.equal(p, before[name])}
    assert moved == adapters


def test_bf16_computes_what_fp32_does_to_within_its_rounding() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        model = small("gpt-oss")
        with_adapters(model)
        if precision == "bf16":
            for parameter in model.parameters():
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
        apply_precision(model, precision)
        losses.append(CausalLoss(model)(**packed_rows()).item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [("q_proj, v_proj", 2), ("mlp.experts.down_proj", 1), ("gate_up_proj,down_proj,q_proj", 3), ("all-linear", 6)],
)
def test_what_has_adapters_can_be_chosen(targets: str, adapted: int) -> None:
    names = add_adapters(small("gpt-oss"), RunConfig(model_name="a", lora_rank=2, lora_targets=targets))
    assert len(names) == 2 * 2 * adapted, "two layers, two matrices"


def test_a_target_that_the_model_has_not_is_refused_before_it_is_loaded() -> None:
    config = RunConfig(model_name="tiny-gpt-oss", lora_rank=2, lora_targets="q_proj,up_proj,")
    with pytest.raises(ConfigError) as refused:
        load_config(config, TOKENIZER)
    assert len(refused.value.problems) == 2 and "'up_proj'" in str(refused.value)


# --- what a run stores and leaves -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss model in a folder, as a user has one."""
    config = gpt_oss_config(8)
    config.vocab_size = 1024
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill_randomly(model)
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def options(base: Path) -> tuple[str, ...]:
    return (
        *("--model-name", str(base), "--run-id", "mine", "--lora-rank", "4"),
        *(
            "--precision",
            "fp32",
            "--learning-rate",
            "1e-2",
        ),  # so that four steps tell the exports of one from no change
        *("--max-steps", "4", "--save-steps", "2", "--save-total-limit", "9", "--logging-steps", "1"),
    )


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = train(tmp_path_factory.mktemp("lora") / "out", *options(base), env=environment())
    assert run.code == 0, run.output
    return run


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    shutil.copytree(finished.folder, tmp_path / "out")
    return Run(finished.code, finished.output, tmp_path / "out")


@pytest.fixture
def other_base(base: Path) -> Iterator[None]:
    """The model in the folder has been trained on meanwhile."""
    path = base / "model.safetensors"
    before = path.read_bytes()
    save_file({name: tensor * 1.001 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert path.stat().st_size == len(before)
    yield
    path.write_bytes(before)


def test_stock_libraries_open_both_exports_and_give_the_same_logits(base: Path, finished: Run) -> None:
    ids = torch.randint(0, 1024, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, finished.run / "adapter")(ids).logits
        whole = AutoModelForCausalLM.from_pretrained(finished.run / "model", dtype=torch.float32)(ids).logits
    assert (adapted - before).abs().max() > 0.05
    torch.testing.assert_close(whole, adapted, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_holds_adapters_and_their_moments_and_no_frozen_weight(finished: Run) -> None:
    names = committed(open_store(finished.run))[0].open().shards().tensors.keys()
    assert names and all("lora_" in name for name in names)
    with safe_open(finished.run / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert len(names) == 4 * len(file.keys()), "each has itself, two moments and a step count"


def test_a_resumed_run_leaves_the_same_files_bit_for_bit(base: Path, copied: Run) -> None:
    files = [copied.run / "model" / "model.safetensors", copied.run / "adapter" / "adapter_model.safetensors"]
    before = [path.read_bytes() for path in files]
    go_back(copied, 2)
    for path in files:
        shutil.rmtree(path.parent)
    resumed = train(copied.folder, *options(base), env=environment())
    assert resumed.code == 0, resumed.output
    assert "resumed from the checkpoint of step 2/4" in resumed.output
    assert [path.read_bytes() for path in files] == before
    again = train(copied.folder, *options(base), env=environment())
    assert again.code == 0 and "nothing to do" in again.output


def test_other_frozen_weights_are_refused(
    base: Path, copied: Run, other_base: None, tmp_path: Path, native_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = train(copied.folder, *options(base), env=environment())
    assert resumed.code == 2 and "changed since it began" in resumed.output
    assert cli.run_command(["export", str(copied.run), "--output", str(tmp_path / "merged")]) == 2
    assert "changed since it began" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [None, "merged", "adapter"])
def test_the_export_command_writes_what_the_run_left(
    finished: Run, tmp_path: Path, native_here: None, kind: str | None
) -> None:
    asked = ("--lora-export", kind) if kind else ()
    assert cli.run_command(["export", str(finished.run), "--output", str(tmp_path / "x"), *asked]) == 0
    own = finished.run / ("adapter" if kind == "adapter" else "model")
    assert {path.name for path in own.iterdir()} == {path.name for path in (tmp_path / "x").iterdir()}
    for path in own.iterdir():
        assert (tmp_path / "x" / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_export_command_refuses_what_it_cannot_write(
    finished: Run, tmp_path: Path, native_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", str(finished.run), "--output", str(tmp_path / "x")]
    assert cli.run_command([*export, "--lora-export", "both"]) == 2
    assert "--lora-export 'both'" in capsys.readouterr().err
    assert cli.run_command([*export, "--lora-export", "adapter", "--dtype", "bf16"]) == 2
    assert "--dtype bf16" in capsys.readouterr().err
