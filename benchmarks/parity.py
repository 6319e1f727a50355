"""The same run on the native backend, on 1, 2 and 4 XLA devices and on 2 gloo processes: do the losses agree?

    python benchmarks/parity.py [--dataset-name FILE --tokenizer-name FOLDER] [--steps 30]

Prints one row a device set: the largest relative difference of the losses from the native ones (over the first ten
steps, and over all), what the run says of its compilations and host reads, tokens a second, and wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GLOBAL_BATCH = 8
DEVICE_SETS = {
    "native": (None, 1),
    "native, 2 gloo processes": (None, 2),
    "xla, 1 device": (1, 1),
    "xla, 2 devices": (2, 1),
    "xla, 4 devices": (4, 1),
}
"""Name: (virtual XLA devices or None for native, processes)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-name", default="synthetic-gsm8k")
    parser.add_argument("--tokenizer-name")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-seq-length", type=int, default=256)
    arguments = parser.parse_args()
    print(f"| {'devices':26} | first 10 | all steps | tokens/s | wall s | summary")
    print("|---|---|---|---|---|---")
    with tempfile.TemporaryDirectory() as folder:
        reference: list[float] | None = None
        for name, (devices, processes) in DEVICE_SETS.items():
            started = time.monotonic()
            metrics, summary = _train(Path(folder), name, devices, processes, arguments)
            losses = [record["loss"] for record in metrics]
            reference = reference or losses
            differences = [abs(loss / base - 1) for loss, base in zip(losses, reference, strict=True)]
            speed = sorted(record["tokens_per_second"] for record in metrics)[len(metrics) // 2]
            wall = time.monotonic() - started
            print(
                f"| {name:26} | {max(differences[:10]):.1e} | {max(differences):.1e} | {speed:.0f} | {wall:.0f} "
                f"| {summary}",
                flush=True,
            )


def _train(
    folder: Path, name: str, devices: int | None, processes: int, arguments: argparse.Namespace
) -> tuple[list[dict[str, float]], str]:
    replicas = (devices or 1) * processes
    # The accumulation is 2 on four devices, and what the same global batch needs on fewer.
    options = {
        "--model-name": "tiny-qwen3",
        "--dataset-name": arguments.dataset_name,
        "--format": "gsm8k",
        "--tokenizer-name": arguments.tokenizer_name,
        "--precision": "fp32",
        "--learning-rate": "1e-3",
        "--max-seq-length": str(arguments.max_seq_length),
        "--per-device-train-batch-size": "1",
        "--gradient-accumulation-steps": str(GLOBAL_BATCH // replicas),
        "--max-steps": str(arguments.steps),
        "--save-steps": "0",
        "--logging-steps": "10",
        "--backend": "xla" if devices else "native",
        "--output-dir": str(folder / name.replace(" ", "-")),
        "--cache-dir": str(folder / "cache"),
    }
    flat = [part for option, value in options.items() if value is not None for part in (option, value)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if devices:
        env |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "numina_finetune", *flat]
    if processes > 1:
        env["ACCELERATE_USE_CPU"] = "1"
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{name} failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    (records,) = Path(options["--output-dir"]).glob("*/metrics.jsonl")
    metrics = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    summary = next((line for line in result.stdout.splitlines() if "compilations" in line or "eager" in line), "")
    return metrics, summary


if __name__ == "__main__":
    main()
