"""What loading a layer of gpt-oss-120b takes: memory, bytes read, time.

    python benchmarks/model_load.py [--experts 128] [--folder FOLDER] [--sides native "fsdp=2,expert=2" "host 3 of 16"]

A synthetic checkpoint of one layer at full size (hidden and intermediate 2880, 64 heads of 64, 8 of them for keys,
MXFP4 experts; the vocabulary is 1024) is written a row at a time and loaded in bf16, each side in a process of its own:
``native`` on the CPU; a mesh of four virtual XLA devices, whose memory is this process's; and a host's share of a model
that is split over so many. The peak is the kernel's, mapped pages of the file included, above what was resident before.
It should stay below the own shards and twice the largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("native", "fsdp=2,expert=2", "host 3 of 16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="where on the disk; a temporary folder if unset")
    parser.add_argument("--sides", nargs="+", default=SIDES)
    arguments = parser.parse_args()
    print("| side | own GB | largest tensor GB | peak GB | bound GB | read GB | of GB | s | CPU s |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for side in arguments.sides:
            found = elsewhere(side, Path(folder) / "model", arguments.experts)
            bound = found["own"] + 2 * found["largest"]
            sizes = (found["own"], found["largest"], found["peak"], bound, found["read"], found["stored"])
            cells = [*(f"{size / 1e9:.2f}" for size in sizes), f"{found['seconds']:.0f}", f"{found['cpu_seconds']:.0f}"]
            print(f"| {side} | {' | '.join(cells)} |", flush=True)


def elsewhere(side: str, folder: Path, experts: int) -> dict[str, Any]:
    """The side's figures, measured in a process of its own."""
    command = [sys.executable, "-m", "tests.models.peak", str(folder), side, str(experts)]
    xla = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"} if "=" in side else {"USE_TORCH_XLA": "false"}
    env = {**os.environ, "PYTHONPATH": str(ROOT), **xla}
    result = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
