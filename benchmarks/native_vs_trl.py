"""Training steps of the native backend against TRL's ``SFTTrainer``: the same model, samples and device in one run.

    python benchmarks/native_vs_trl.py [--dataset-name FILE --tokenizer-name FOLDER] [--layout packed unpacked]

Each side trains the same random Qwen3 on the same tokenised samples, in a process of its own and by its own trainer:
``train`` here; ``SFTTrainer`` with its default loss and with ``chunked_nll`` there, given ``input_ids`` and ``labels``,
so that it packs and batches for itself. No side recomputes activations. What counts is what passes between the
beginnings of two steps, data and logging included, after some steps of warming up: tokens that are not padding, and
those with loss, per CPU second (per second on a GPU). The peak of memory is the kernel's count of this process up to
the last of these steps (on a GPU, what its allocator gave at most).

Needs the ``bench`` extra for TRL.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("ours", "ours-compiled", "trl", "trl-chunked")


@dataclass(frozen=True)
class Case:
    side: str
    layout: str
    """packed or unpacked."""
    precision: str
    """fp32, or bf16: fp32 weights, computed with in bf16."""


@dataclass(frozen=True)
class Result:
    tokens: int
    """That are not padding, in the measured steps."""
    supervised: int
    slots: int
    """Positions of the batches, padding included."""
    seconds: float
    """CPU seconds; seconds on a GPU."""
    peak_mb: float
    loss: float
    """Of the first logged step: that both sides train the same."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-name", default="synthetic-gsm8k", help="Rows of questions and answers.")
    parser.add_argument("--tokenizer-name", help="Folder or hub name; one trained on the dataset if unset.")
    parser.add_argument("--layout", nargs="+", default=["packed", "unpacked"], choices=["packed", "unpacked"])
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--side", nargs="+", default=[side for side in SIDES if side != "ours-compiled"], choices=SIDES)
    parser.add_argument("--steps", type=int, default=12, help="Measured steps.")
    parser.add_argument("--warm-up", type=int, default=3, help="Steps before them.")
    parser.add_argument("--rounds", type=int, default=2, help="Each side in turn so often; its best counts.")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--intermediate-size", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--vocabulary", type=int, default=8192, help="Of the trained tokenizer, and of the model at least."
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        with tempfile.TemporaryDirectory() as folder:
            result = _measure(Case(**arguments.case), arguments, Path(folder))
        print(json.dumps(asdict(result)))
    else:
        _table(arguments)


def _table(arguments: argparse.Namespace) -> None:
    cases = [
        Case(side, layout, precision)
        for layout in arguments.layout
        for precision in arguments.precision
        for side in arguments.side
    ]
    seen: dict[Case, list[Result]] = {case: [] for case in cases}
    for _ in range(arguments.rounds):  # in turn, so that a busy machine is busy for all
        for case in cases:
            seen[case].append(_run(case))
    best = {case: min(results, key=lambda result: result.seconds) for case, results in seen.items()}
    print(
        "| layout | precision | side | tokens/s | supervised/s | filled | peak MB | first loss | tokens/s over TRL's |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for case, result in best.items():
        peers = [
            peer.tokens / peer.seconds
            for other, peer in best.items()
            if other.side.startswith("trl") and (other.layout, other.precision) == (case.layout, case.precision)
        ]
        rate = result.tokens / result.seconds
        print(
            f"| {case.layout} | {case.precision} | {case.side} | {rate:.1f} | {result.supervised / result.seconds:.1f} "
            f"| {result.tokens / result.slots:.1%} | {result.peak_mb:.0f} | {result.loss:.3f} "
            f"| {f'{rate / max(peers):.2f}' if peers else ''} |"
        )
    print("Seconds are CPU seconds, or seconds on a GPU; the last column: tokens/s over the faster of TRL's losses.")


def _run(case: Case) -> Result:
    command = [sys.executable, __file__, *sys.argv[1:], "--case", json.dumps(asdict(case))]
    threads = str(_argument("--threads", "1"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "USE_TORCH_XLA": "false"}
    environment |= {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"{case} failed")
    return Result(**json.loads(result.stdout.splitlines()[-1]))


def _argument(name: str, default: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


# --- one side ---------------------------------------------------------------------------------------------------------


class _Marks:
    """What a side had done and spent when each of its steps began."""

    def __init__(self, warm_up: int, steps: int) -> None:
        self._measured = slice(warm_up, warm_up + steps)
        self._begun: list[float] = []
        self._work: list[tuple[int, int, int]] = []
        self.peak_mb = 0.0

    def begin(self, tokens: int, supervised: int, slots: int) -> None:
        self._begun.append(_seconds())
        self._work.append((tokens, supervised, slots))
        if len(self._begun) == self._measured.stop + 1:
            self.peak_mb = _peak_mb()

    def result(self, loss: float) -> Result:
        tokens, supervised, slots = map(sum, zip(*self._work[self._measured], strict=True))
        return Result(
            tokens,
            supervised,
            slots,
            seconds=self._begun[self._measured.stop] - self._begun[self._measured.start],
            peak_mb=self.peak_mb,
            loss=loss,
        )


def _seconds() -> float:
    """CPU seconds of this process; on a GPU, seconds up to when it is done with what it was given."""
    import torch

    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.monotonic()


def _peak_mb() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def _measure(case: Case, arguments: argparse.Namespace, folder: Path) -> Result:
    model = folder / "model"
    _save_model(model, arguments)
    marks = _Marks(arguments.warm_up, arguments.steps)
    steps = arguments.warm_up + arguments.steps + 1
    side = _ours if case.side.startswith("ours") else _trl
    return marks.result(side(case, arguments, folder, steps, marks))


def _save_model(folder: Path, arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from numina_finetune.config import SourceConfig
    from numina_finetune.data import format_example
    from numina_finetune.data.sources import load_rows
    from numina_finetune.models.builtin import TINY_TOKENIZER

    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name or str(TINY_TOKENIZER))
    if not arguments.tokenizer_name:
        rows = load_rows(SourceConfig(arguments.dataset_name))
        texts = (message["content"] for row in rows for message in format_example(row)["messages"])
        tokenizer = tokenizer.train_new_from_iterator(texts, arguments.vocabulary, show_progress=False)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=-(-max(arguments.vocabulary, len(tokenizer)) // 64) * 64,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.heads // 2,
        head_dim=arguments.head_dim,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _ours(case: Case, arguments: argparse.Namespace, folder: Path, steps: int, marks: _Marks) -> float:
    from numina_finetune.checkpoint.preemption import StopNotice
    from numina_finetune.config import RunConfig, SourceConfig
    from numina_finetune.data.loader import NO_LOSS
    from numina_finetune.torch_native.backend import NativeBackend
    from numina_finetune.train.run import train

    class Marked(NativeBackend):
        def put_batch(self, rows: Any) -> Any:
            self.work = (int((rows.segment_ids > 0).sum()), int((rows.labels != NO_LOSS).sum()), rows.labels.size)
            return super().put_batch(rows)

        def step(self, batches: Any, learning_rate: float) -> Any:
            marks.begin(*self.work)
            return super().step(batches, learning_rate)

    compiled = {"torch_compile": True} if case.side == "ours-compiled" else {}
    config = RunConfig(
        model_name=str(folder / "model"),
        datasets=(SourceConfig(arguments.dataset_name),),
        cache_dir=str(folder / "cache"),
        output_dir=str(folder / "runs"),
        max_seq_length=arguments.max_seq_length,
        per_device_train_batch_size=arguments.batch_size,
        packing=case.layout == "packed",
        precision=case.precision,
        backend="native",
        remat="none",
        max_steps=steps,
        save_steps=0,
        **compiled,
    )
    with StopNotice() as notice:
        train(config, Marked, notice)
    (metrics,) = folder.glob("runs/*/metrics.jsonl")
    return float(json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])["loss"])


def _trl(case: Case, arguments: argparse.Namespace, folder: Path, steps: int, marks: _Marks) -> float:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from numina_finetune.config import SourceConfig
    from numina_finetune.data.dataset import build_index
    from numina_finetune.data.prepare import IndexOptions

    class Marked(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
            labels, mask = inputs["labels"], inputs.get("attention_mask")
            slots = inputs["input_ids"].numel()
            tokens = slots if mask is None else int(mask.sum())
            marks.begin(tokens, int((labels != -100).sum()), slots)
            return super().training_step(model, inputs, *more, **options)

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    sources = [SourceConfig(arguments.dataset_name)]
    index = build_index(sources, tokenizer, IndexOptions(arguments.max_seq_length), folder / "cache")
    samples = []
    for number in range(len(index)):
        ids, targets = index.sample(number)
        labels = [token if target else -100 for token, target in zip(ids.tolist(), targets, strict=True)]
        samples.append({"input_ids": ids.tolist(), "labels": labels})
    config = SFTConfig(
        str(folder / "trl"),
        max_length=arguments.max_seq_length,
        packing=case.layout == "packed",
        shuffle_dataset=True,
        loss_type="chunked_nll" if case.side == "trl-chunked" else "nll",
        per_device_train_batch_size=arguments.batch_size,
        max_steps=steps,
        bf16=case.precision == "bf16",
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = Marked(model, config, train_dataset=Dataset.from_list(samples), processing_class=tokenizer)
    trainer.train()
    return float(next(record["loss"] for record in trainer.state.log_history if "loss" in record))


if __name__ == "__main__":
    main()
