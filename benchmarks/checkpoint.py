"""What a checkpoint costs: training's stall, the time until it is committed, and memory.

    python benchmarks/checkpoint.py [--layers 28] [--to disk|emulator] [--folder FOLDER] [--sides async sync stock]

The state is Qwen3-0.6B's, fp32 with AdamW's moments (7 GB at all 28 layers), on the native backend's CPU path. The
sides: ``async`` (the default way of saving), ``sync`` (``--no-async-save``), and ``stock``, which is Accelerate's own
``save_state`` of the same model and optimizer, to a disk only. Each is measured in a process of its own, after a small
save that loads the libraries, over several saves. Our two sides find the memory of their copies reserved, as does a
training whose first save comes after its first steps. Between a save's return and its commit, async goes on making
steps in place. The peak is the resident memory above that of model and optimizer. What stock leaves in the page cache
is not durable yet: its files' fsync is counted into its total, not into its stall.

The emulator holds objects in its own memory, several times: give it 7 layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("async", "sync", "stock")
Save = Callable[[int], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--to", choices=("disk", "emulator"), default="disk")
    parser.add_argument("--folder", type=Path, help="where on the disk; a temporary folder if unset")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=None)
    parser.add_argument("--saves", type=int, default=3, help="one after another in the same process")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--place", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.place, arguments)))
        return
    print("| to | side | save | state GB | stall s | total s | MB/s | peak above the state GB | x state |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    sides = arguments.sides or (SIDES if arguments.to == "disk" else SIDES[:2])
    for side in sides:
        for number, found in enumerate(elsewhere(side, arguments), 1):
            gigabytes, peak = found["bytes"] / 1e9, found["peak"] / 1e9
            print(
                f"| {arguments.to} | {side} | {number} | {gigabytes:.2f} | {found['stall']:.2f} | "
                f"{found['total']:.2f} | {found['bytes'] / 1e6 / found['total']:.0f} | {peak:.2f} | "
                f"{peak / gigabytes:.2f} |",
                flush=True,
            )


def elsewhere(side: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The side's figures, measured in a process of its own."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.to == "disk":
            return child(side, f"{folder}/run", arguments, {})
        sys.path.insert(0, str(ROOT))
        from tests.gcs import gcs

        with gcs() as service:
            return child(side, f"{service.url}/run", arguments, service.environment)


def child(side: str, place: str, arguments: argparse.Namespace, extra: dict[str, str]) -> list[dict[str, Any]]:
    command = [sys.executable, __file__, "--measure", side, "--place", place, "--saves", str(arguments.saves)]
    command += ["--layers", str(arguments.layers), "--vocabulary", str(arguments.vocabulary)]
    env = {**os.environ, "USE_TORCH_XLA": "false", "PYTHONPATH": str(ROOT), **extra}
    result = subprocess.run(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(side: str, place: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    make = stock if side == "stock" else ours
    make(side, f"{place}-warm", Owner(1, 64))(1)
    owner = Owner(arguments.layers, arguments.vocabulary)
    save = make(side, place, owner)
    found = []
    before = _peak_from_now()
    if side != "stock":
        owner.reserve()
    for number in range(1, arguments.saves + 1):
        figures = save(number)
        found.append({**figures, "peak": _peak() - before})
        _peak_from_now()
    return found


class Owner:
    """A model and its optimizer after a step, as the native backend holds them."""

    def __init__(self, layers: int, vocabulary: int) -> None:
        import torch
        from accelerate import Accelerator
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from numina_finetune.checkpoint.shards import COPIES, CopyingPlanner, HostCopies, Snapshots
        from numina_finetune.processes import ProcessGroup

        config = Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
        self.accelerator = Accelerator(cpu=True, rng_types=[])
        self.processes = ProcessGroup()
        self.process_index, self.process_count = 0, 1
        self.model = Qwen3ForCausalLM(config)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        for parameter in self.parameters.values():
            moments = {name: torch.full_like(parameter, 0.5) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.ones(()), **moments}
        self._copies = HostCopies()
        self._snapshots = Snapshots(self.processes, lambda: CopyingPlanner(self._copies), threads=COPIES)

    def make_step(self) -> None:
        """Something of a step: every first moment is written to."""
        for state in self.optimizer.state.values():
            state["exp_avg"].mul_(0.999)

    def reserve(self) -> None:
        """Get the copies' memory, and wait until it is there."""
        pieces = self._snapshots.pieces(self._state())
        self._copies.reserve(pieces)
        self._copies.memory(pieces[0])

    def snapshot(self) -> Any:
        return self._snapshots.take(self._state())

    def _state(self) -> dict[str, Any]:
        from numina_finetune.train.optim import named_state

        return named_state(self.parameters, self.optimizer)

    def restore(self, shards: Any) -> None:
        shards.fill({"model": self.parameters})


def ours(side: str, place: str, owner: Owner) -> Save:
    from numina_finetune.checkpoint.manager import CheckpointManager
    from numina_finetune.checkpoint.progress import Progress
    from numina_finetune.checkpoint.state import StateDoor
    from numina_finetune.storage import open_store

    manager = CheckpointManager(
        open_store(place),
        1,
        StateDoor(owner, Progress()),
        owner.processes,
        hosts=1,
        keep=1,
        facts={},
        asynchronous=side == "async",
    )

    def save(number: int) -> dict[str, Any]:
        manager.save(number)
        while manager.busy:
            owner.make_step()
        manager.finish()
        (saved,) = manager.drain()
        return {"stall": saved.stall_seconds, "total": saved.total_seconds, "bytes": saved.bytes}

    return save


def stock(side: str, place: str, owner: Owner) -> Save:
    owner.accelerator.prepare(owner.model, owner.optimizer)

    def save(number: int) -> dict[str, Any]:
        began = time.monotonic()
        owner.accelerator.save_state(place)
        stall = time.monotonic() - began
        files = [path for path in Path(place).rglob("*") if path.is_file()]
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        size = sum(path.stat().st_size for path in files)
        return {"stall": stall, "total": time.monotonic() - began, "bytes": size}

    return save


def _peak() -> int:
    """The largest resident memory since the last `_peak_from_now`, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def _peak_from_now() -> int:
    """Forget larger peaks; the resident memory now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _peak()


if __name__ == "__main__":
    main()
