"""Optimizers on a mesh, in a process of its own: ``python -m tests.xla.optimizers MODEL FOLDER``.

``FOLDER/native`` holds an Adafactor run after two native steps; it goes on from there. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from numina_finetune import launch
from numina_finetune.config import RunConfig
from tests.train.live import _backend, _digest, _rows

RATE = 1e-2
_TINY: dict[str, Any] = {"max_seq_length": 64, "precision": "fp32", "max_grad_norm": 0.0}
MEASURED = RunConfig(model_name="tiny-qwen3", gradient_noise=True, **_TINY)


def adafactor(model: str) -> RunConfig:
    return RunConfig(model_name=model, optim="adafactor", weight_decay=0.1, **_TINY)


def place(backend: Any, config: RunConfig) -> None:
    from numina_finetune.models.load import load_model
    from numina_finetune.models.tokenizer import load_tokenizer

    backend.place(load_model(config, load_tokenizer(config)), config)


def steps(backend: Any, seeds: range) -> list[Any]:
    """One optimizer step of one micro-batch for each seed."""
    done = [backend.step([backend.put_batch(_rows(seed, 4))], RATE) for seed in seeds]
    return backend.read(done)  # type: ignore[no-any-return]


def measured(name: str) -> dict[str, Any]:
    """AdamW's first steps without clipping, its first moment after one of them, and what is measured."""
    backend = _backend(MEASURED, name)
    place(backend, MEASURED)
    first = steps(backend, range(1))
    moments = [shard.data.view("float32") for shard in backend.snapshot() if shard.piece.name.endswith(".exp_avg")]
    found = [*first, *steps(backend, range(1, 4))]
    return {
        "moment": sum(float((moment.astype("float64") ** 2).sum()) for moment in moments) ** 0.5,
        "norms": [metric.grad_norm for metric in found],
        "parts": [[metric.signal, metric.noise] for metric in found],
        "summary": backend.summary(),
    }


def main(model: str, folder: Path) -> dict[str, Any]:
    from dataclasses import replace

    from numina_finetune.train.loss import CausalLoss

    config = replace(adafactor(model), mesh="fsdp=2,tensor=2")
    launch.prepare_environment("xla")
    backend = _backend(config, "xla")
    place(backend, config)
    backend.restore(saved(folder / "native"))
    metrics = steps(backend, range(2, 3))
    save(backend, folder / "middle")
    metrics += steps(backend, range(3, 4))
    digest = _digest(backend)

    place(backend, config)
    backend.restore(saved(folder / "middle"))
    steps(backend, range(3, 4))
    again = _digest(backend)
    save(backend, folder / "xla")
    summary = backend.summary()

    sound = CausalLoss.forward
    CausalLoss.forward = lambda self, **batch: sound(self, **batch) * float("nan")  # type: ignore[method-assign]
    (skipped,) = steps(backend, range(1))
    CausalLoss.forward = sound  # type: ignore[method-assign]
    return {
        "losses": [metric.loss for metric in metrics],
        "resumed": digest == again,
        "summary": summary,
        "skipped": not skipped.applied and _digest(backend) == again,
        "measured": measured("xla"),
    }


def save(backend: Any, folder: Path) -> None:
    """The backend's state in files below ``folder``, as a checkpoint has them."""
    from numina_finetune.checkpoint.upload import Captured, confirm_host, upload_host
    from numina_finetune.storage import open_store

    store = open_store(folder)
    confirm_host(store, "", 0, upload_host(store, "", 0, Captured(backend.snapshot(), {})))


def saved(folder: Path) -> Any:
    """The state that :func:`save` left, a ``ShardReader``."""
    from numina_finetune.checkpoint.layout import done_name
    from numina_finetune.checkpoint.shards import ShardReader
    from numina_finetune.checkpoint.upload import read_index
    from numina_finetune.storage import open_store

    store = open_store(folder)
    index = read_index(store.read(done_name(0)))
    return ShardReader(store, "", index.files, index.pieces)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
