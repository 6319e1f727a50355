"""Training steps of a native backend, in one process or several: ``python -m tests.torch_native.live FOLDER MESH``.

Each process prints one JSON object: by case, what :func:`steps` gives.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from numina_finetune import launch
from numina_finetune.config import RunConfig
from numina_finetune.data.loader import Batch
from tests.programs import tell

ROWS, LENGTH, STEPS = 8, 64, 10
CASES: dict[str, dict[str, Any]] = {
    "stored": {"precision": "fp32"},
    "gpt-oss": {"model_name": "tiny-gpt-oss", "precision": "bf16", "remat": "none"},
    "adapters": {"lora_rank": 4, "precision": "bf16"},
}
"""``stored`` has its weights in a file, so that each process reads its parts only."""


def options(case: str, folder: Path) -> RunConfig:
    plain: dict[str, Any] = {"model_name": "tiny-qwen3", "tokenizer_name": "tiny-qwen3", "max_seq_length": LENGTH}
    plain |= {"max_grad_norm": 0.5, "weight_decay": 0.1}
    if case == "stored":
        plain["model_name"] = str(folder / "model")
    return RunConfig.from_mapping(plain | CASES[case])


def store_model(folder: Path) -> None:
    """The weights that the case ``stored`` begins with."""
    from numina_finetune.models.load import load_model
    from numina_finetune.models.tokenizer import load_tokenizer

    config = RunConfig(model_name="tiny-qwen3", precision="fp32", max_seq_length=LENGTH)
    load_model(config, load_tokenizer(config)).save_pretrained(folder / "model")


def rows(step: int) -> Batch:
    """Packed rows with padding behind them; rows have very different numbers of tokens with loss."""
    rng = np.random.default_rng(step)
    ids = rng.integers(5, 200, (ROWS, LENGTH), dtype=np.int32)
    labels = np.concatenate([ids[:, 1:], np.full((ROWS, 1), -100, np.int32)], axis=1)
    segments, positions = np.zeros_like(ids), np.zeros_like(ids)
    for row in range(ROWS):
        first, end = rng.integers(5, 40), rng.integers(45, LENGTH + 1)
        for number, (start, stop) in enumerate(((0, first), (first, end)), start=1):
            segments[row, start:stop], positions[row, start:stop] = number, np.arange(stop - start)
            labels[row, stop - 1] = -100
        labels[row, end:] = -100
        labels[row, : rng.integers(0, end)] = -100
    return Batch(ids, labels, segments, positions)


def micro_batches(backend: Any, step: int) -> list[Any]:
    """This process's rows of a step, two at a time."""
    own = ROWS // backend.process_count
    mine = [array[backend.process_index * own :][:own] for array in rows(step)]
    return [backend.put_batch(Batch(*(array[at : at + 2] for array in mine))) for at in range(0, own, 2)]


def steps(mesh: str | None, case: str, folder: Path) -> dict[str, Any]:
    """Train, save in the middle, and go on from there once more in a model without values.

    Returns:
        Losses, gradient norms, tokens; the evaluation and new tokens after the last step; digests of the state at the
        end and of the one that the resumed steps end in; how many values this process holds. The folder keeps the final
        weights.
    """
    import dataclasses

    from numina_finetune.models.load import open_model
    from numina_finetune.models.tokenizer import load_tokenizer
    from numina_finetune.torch_native.backend import NativeBackend
    from numina_finetune.train.backend import Decoding

    config = dataclasses.replace(options(case, folder), mesh=mesh)
    backend, tokenizer = NativeBackend(config), load_tokenizer(config)
    count = STEPS if case == "stored" else 4
    backend.place(*_ordered(open_model(config, tokenizer), config))
    metrics, digests = [], []
    for step in range(count):
        if step == count // 2:
            saved = stored(backend, folder / case / "half")
        metrics.append(backend.step(micro_batches(backend, step), 3e-3))
    evaluated = backend.evaluate(micro_batches(backend, count))
    prompts = [[7, 8, 9], [5], list(range(20, 60))]
    generated = backend.generate(prompts, Decoding(40, frozenset({17}), 0, 2), lambda tokens: tokens[-1] % 3 == 0)
    end = stored(backend, folder / case / "end")
    if backend.process_index == 0:
        save_file(
            {name: end.read(name) for name in end.tensors if name.startswith("model.")}, weights_file(case, folder)
        )
    digests.append(digest(backend))
    backend.place(*_ordered(open_model(config, tokenizer, weights=False), config))
    backend.restore(saved)
    for step in range(count // 2, count):
        backend.step(micro_batches(backend, step), 3e-3)
    digests.append(digest(backend))
    read = backend.read(metrics)
    return {
        "losses": [metric.loss for metric in read],
        "norms": [metric.grad_norm for metric in read],
        "tokens": [[metric.supervised, metric.tokens] for metric in read],
        "evaluated": evaluated,
        "generated": generated,
        "digests": digests,
        "held": sum(t.numel() for t in _local(backend)),
    }


def weights_file(case: str, folder: Path) -> Path:
    return folder / case / "weights.safetensors"


def _ordered(opened: tuple[Any, Any], config: RunConfig) -> tuple[Any, RunConfig, Any]:
    model, weights = opened
    return model, config, weights


def stored(backend: Any, folder: Path) -> Any:
    """The state in files of ``folder``, those of all processes; and the way back to it."""
    from numina_finetune.checkpoint.shards import ShardReader
    from numina_finetune.checkpoint.upload import Captured, upload_host
    from numina_finetune.storage import open_store

    store = open_store(folder)
    own = upload_host(store, "saved/", backend.process_index, Captured(backend.snapshot(), {}))
    indices = backend.processes.gather(own)
    files = {name: file for index in indices for name, file in index.files.items()}
    return ShardReader(store, "saved/", files, [piece for index in indices for piece in index.pieces])


def digest(backend: Any) -> str:
    found = hashlib.sha256()
    for tensor in _local(backend):
        found.update(tensor.detach().numpy().tobytes())
    return found.hexdigest()


def _local(backend: Any) -> list[torch.Tensor]:
    """This process's part of weights and moments."""
    state = backend._state()
    tensors = [*state["model"].values(), *(t for moments in state["optim"].values() for t in moments.values())]
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]


if __name__ == "__main__":
    launch.prepare_environment("native")
    found = {case: steps(sys.argv[2], case, Path(sys.argv[1])) for case in CASES}
    tell(found, Path(sys.argv[1]))
