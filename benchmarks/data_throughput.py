"""Data preparation against TRL's, and against the tokenizer alone, on the same rows with the same tokenizer.

    python benchmarks/data_throughput.py [--dataset-name FILE --tokenizer-name FOLDER] [--processes 1 2]
    python benchmarks/data_throughput.py --memory-rows 1000000

Each side runs in a process of its own and counts CPU seconds, its worker processes' included, after its imports:

- ours: read, format, validate, render, verify the mask, write the index, pack (all defaults);
- trl: ``SFTTrainer``'s own preparation (chat template, assistant mask, best-fit packing) of rows that are in memory and
  in chat format already;
- encode_batch: the tokenizer alone on the finished text, 512 rows a call.

With ``--memory-rows``: how far the peak memory of preparing so many generated rows lies above that after the imports.
Needs the ``bench`` extra for TRL.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-name", default="synthetic-gsm8k")
    parser.add_argument("--tokenizer-name")
    parser.add_argument("--max-seq-length", type=int, default=1024)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-rows", type=int)
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments)))
    elif arguments.memory_rows:
        _memory(arguments)
    else:
        _throughput(arguments)


def _throughput(arguments: argparse.Namespace) -> None:
    sides = [("encode_batch", 1), *((side, number) for number in arguments.processes for side in ("ours", "trl"))]
    seen: dict[tuple[str, int], list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):  # in turn, so that a busy machine is busy for all
        for side, processes in sides:
            seen[side, processes].append(_run(arguments, side, processes))
    best = {side: min(results, key=lambda result: result["cpu"]) for side, results in seen.items()}
    bare, trl = best["encode_batch", 1], best["trl", arguments.processes[0]]
    print(
        "| side | processes | rows | tokens | fill | CPU s | wall s | rows/CPU s | tokens/CPU s | CPU / encode_batch |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (side, processes), result in best.items():
        print(
            f"| {side} | {processes} | {result['rows']} | {result['tokens']} | {result['fill']:.1%} "
            f"| {result['cpu']:.2f} "
            f"| {result['wall']:.2f} | {result['rows'] / result['cpu']:.0f} | {result['tokens'] / result['cpu']:.0f} "
            f"| {result['cpu'] / bare['cpu']:.2f} |"
        )
    ours = best["ours", arguments.processes[0]]
    print(f"ours / trl, rows per CPU second: {(ours['rows'] / ours['cpu']) / (trl['rows'] / trl['cpu']):.2f}")


def _memory(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number in range(arguments.memory_rows):
                file.write(json.dumps(_generated(number)) + "\n")
        size = path.stat().st_size / 1e6
        arguments.dataset_name = str(path)
        for processes in arguments.processes:
            result = _run(arguments, "ours", processes)
            print(
                f"{arguments.memory_rows} rows, {size:.0f} MB, {processes} processes: "
                f"peak {result['peak_mb']:.0f} MB above the imports' {result['imports_mb']:.0f} MB "
                f"(largest worker {result['worker_mb']:.0f} MB in all), {result['rows'] / result['wall']:.0f} rows/s"
            )


def _run(arguments: argparse.Namespace, side: str, processes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--processes", str(processes)]
    command += ["--dataset-name", arguments.dataset_name, "--max-seq-length", str(arguments.max_seq_length)]
    if arguments.tokenizer_name:
        command += ["--tokenizer-name", arguments.tokenizer_name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "USE_TORCH_XLA": "false"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"{side} failed: {' '.join(command)}")
    parsed: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return parsed


# --- the sides --------------------------------------------------------------------------------------------------------


class _Clock:
    """CPU and wall seconds since it was made, of this process and of its ended children."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), self._now()
        self._imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @staticmethod
    def _now() -> float:
        usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def read(self) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "wall": time.monotonic() - self._wall,
            "cpu": self._now() - self._cpu,
            "imports_mb": self._imports / 1e3,
            "peak_mb": (peak - self._imports) / 1e3,
            "worker_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3,
        }


def _ours(arguments: argparse.Namespace) -> dict[str, Any]:
    import datasets  # noqa: F401 (its import is not what is measured)

    from numina_finetune.config import SourceConfig
    from numina_finetune.data.dataset import build_index
    from numina_finetune.data.loader import Loader
    from numina_finetune.data.prepare import IndexOptions

    tokenizer = _tokenizer(arguments)
    with tempfile.TemporaryDirectory() as folder:
        clock = _Clock()
        length, workers = arguments.max_seq_length, arguments.processes[0]
        sources = [SourceConfig(arguments.dataset_name)]
        index = build_index(sources, tokenizer, IndexOptions(length), folder, workers=workers)
        loader = Loader(index, seq_len=length, packing=True, seed=0, pad_id=tokenizer.pad_token_id)
        rows = loader.rows_per_epoch
        used = clock.read()
        (source,) = index.report["sources"]
        return {"rows": source["rows"], "tokens": source["tokens"], "fill": source["tokens"] / (rows * length), **used}


def _trl(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = _tokenizer(arguments)
    torch.set_num_threads(1)
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8)
    )
    rows = Dataset.from_list([{"messages": messages} for messages in _conversations(arguments)])
    prepare, measured = SFTTrainer._prepare_dataset, {}

    def timed(*args: Any, **options: Any) -> Any:
        clock = _Clock()
        prepared = prepare(*args, **options)
        measured.update(clock.read())
        return prepared

    SFTTrainer._prepare_dataset = timed
    with tempfile.TemporaryDirectory() as folder:
        processes = arguments.processes[0]
        config = SFTConfig(
            folder,
            max_length=arguments.max_seq_length,
            packing=True,
            assistant_only_loss=True,
            dataset_num_proc=processes if processes > 1 else None,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "fill": sum(lengths) / (len(lengths) * arguments.max_seq_length),
        **measured,
    }


def _encode_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    from numina_finetune.data.conversation import Conversation
    from numina_finetune.data.families.qwen3 import Qwen3

    tokenizer = _tokenizer(arguments)
    texts = [
        "".join(piece.text for piece in Qwen3().pieces(Conversation(messages)))
        for messages in _conversations(arguments)
    ]
    clock = _Clock()
    tokens = 0
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer.backend_tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)
        tokens += sum(map(len, encoded))
    return {"rows": len(texts), "tokens": tokens, "fill": 0, **clock.read()}


SIDES = {"ours": _ours, "trl": _trl, "encode_batch": _encode_batch}


def _tokenizer(arguments: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    from numina_finetune.models.builtin import TINY_TOKENIZER

    return AutoTokenizer.from_pretrained(arguments.tokenizer_name or str(TINY_TOKENIZER))


def _conversations(arguments: argparse.Namespace) -> list[Any]:
    from numina_finetune.config import SourceConfig
    from numina_finetune.data import format_example
    from numina_finetune.data.sources import load_rows

    return [format_example(row)["messages"] for row in load_rows(SourceConfig(arguments.dataset_name))]


def _generated(number: int) -> dict[str, str]:
    """A row as long as GSM8K's are on average."""
    a, b, c = number % 997 + 2, number % 89 + 3, number % 13 + 2
    question = (
        f"Shop {number} sells {a} red and {b} blue lamps on each of {c} days. A red lamp costs as much as two blue "
        "ones, and every customer takes one lamp of each colour as long as there are any. How many lamps does shop "
        f"{number} sell in all, if none of them is ever given back, and the shop is open on each of these days?"
    )
    answer = (
        f"On one day the shop sells {a}+{b} = <<{a}+{b}={a + b}>>{a + b} lamps.\n"
        f"On {c} days it sells {c}*{a + b} = <<{c}*{a + b}={c * (a + b)}>>{c * (a + b)} lamps.\n"
        f"The prices do not matter for how many lamps are sold, and none of them comes back.\n#### {c * (a + b)}"
    )
    return {"question": question, "answer": answer}


if __name__ == "__main__":
    main()
