"""What bf16 weights lose against fp32 masters, with and without stochastic rounding.

    python benchmarks/pure_bf16.py [--steps 400] [--rate 1e-5]

Trains tiny-qwen3 on synthetic-gsm8k natively from the same random weights, in a process for each: `--precision bf16`
(fp32 masters), `--precision pure-bf16` (stochastic rounding), and the same rounded to the nearest. Prints the loss over
the last tenth of the steps, the share of weights that are not what they were, how far they went and in which direction,
against the masters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

WAYS = {"fp32 masters": "bf16", "stochastic": "pure-bf16", "nearest": "pure-bf16"}


def train(model: str, folder: Path, way: str, steps: int, rate: float) -> None:
    """One training, in this process."""
    from numina_finetune import launch

    launch.prepare_environment("native")
    from numina_finetune.cli.entry import run_command
    from numina_finetune.train import optim

    if way == "nearest":
        assert optim.make_optimizer.__kwdefaults__
        optim.make_optimizer.__kwdefaults__["rounding"] = lambda value, step, salt: value.bfloat16()
    options = {
        **{"model-name": model, "dataset-name": "synthetic-gsm8k", "max-seq-length": 128},
        **{"per-device-train-batch-size": 1, "max-steps": steps, "learning-rate": rate, "precision": WAYS[way]},
        **{"lr-scheduler-type": "constant", "backend": "native", "output-dir": folder, "run-id": "run"},
        **{"logging-steps": 100, "save-steps": 0},
    }
    sys.exit(run_command([word for name, value in options.items() for word in (f"--{name}", str(value))]))


def weights_of(folder: Path) -> torch.Tensor:
    """All weights of the exported model, one vector."""
    tensors = load_file(folder / "run" / "model" / "model.safetensors")
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


def loss_of(folder: Path) -> float:
    """Mean over the last tenth of the steps."""
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = [record["loss"] for record in records if "loss" in record]
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=1e-5)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "FOLDER", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        train(given.one[0], Path(given.one[1]), given.one[2], given.steps, given.rate)
    with tempfile.TemporaryDirectory() as scratch:
        found, start = {}, Path(scratch) / "start"
        # A model that bf16 holds exactly, for all of them to begin from.
        runs = [("tiny-qwen3", start, "nearest", 1, 0.0)]
        runs += [(f"{start}/run/model", Path(scratch) / way, way, given.steps, given.rate) for way in WAYS]
        for model, folder, way, steps, rate in runs:
            words = [sys.executable, __file__, "--steps", str(steps), "--rate", str(rate)]
            subprocess.run([*words, "--one", model, str(folder), way], check=True, stdout=subprocess.DEVNULL)
            found[folder.name] = weights_of(folder), loss_of(folder)
    before, _ = found.pop("start")
    exact = found["fp32 masters"][0] - before
    print("| weights | loss | moved | distance / masters' | cosine |\n|---|---|---|---|---|")
    for way, (weights, loss) in found.items():
        moved = weights - before
        cosine = torch.nn.functional.cosine_similarity(moved, exact, dim=0).item()
        print(
            f"| {way} | {loss:.4f} | {(moved != 0).float().mean().item():.1%} | "
            f"{(moved.norm() / exact.norm()).item():.3f} | {cosine:.3f} |"
        )


if __name__ == "__main__":
    main()
