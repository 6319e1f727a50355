"""A backend at work in a process of its own, for tests that need the live model: ``python -m tests.train.live``.

Prints one JSON object. The backend is chosen by the environment, as a user's would be.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from numina_finetune import launch
from numina_finetune.config import RunConfig
from tests.programs import tell


def main(task: str, folder: Path, *options: str) -> dict[str, Any]:
    mapping = dict(option.split("=", 1) for option in options)
    config = RunConfig.from_mapping({"model_name": "tiny-qwen3", "max_seq_length": 64, **mapping})
    name, _ = launch.choose_backend(config)
    launch.prepare_environment(name)
    tasks = {"export": export, "nonfinite": nonfinite, "reload": reload, "uneven": uneven, "generation": generation}
    tasks |= {"evaluation": evaluation}
    return tasks[task](config, name, folder)


def export(config: RunConfig, name: str, folder: Path) -> dict[str, Any]:
    """Train two steps, export, and compare the live model's logits with the exported one's."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from numina_finetune.models.export import export_model, trained_weights
    from numina_finetune.models.load import load_config, load_model
    from numina_finetune.models.precision import EXPORT_DTYPES
    from numina_finetune.models.tokenizer import load_tokenizer

    backend, tokenizer = _backend(config, name), load_tokenizer(config)
    model = load_model(config, tokenizer)
    start = hashlib.sha256(model.model.embed_tokens.weight.detach().float().numpy().tobytes()).hexdigest()
    backend.place(model, config)
    for seed in range(2):
        backend.step([backend.put_batch(_rows(seed, 4))], 1e-2)
    export_model(
        trained_weights(_stored(backend, folder), config, tokenizer, EXPORT_DTYPES[config.precision]),
        folder / "model",
        config=load_config(config, tokenizer),
        tokenizer=tokenizer,
        generation=GenerationConfig(),
        card="",
        dtype=EXPORT_DTYPES[config.precision],
    )
    batch = _rows(9, 4)
    with torch.no_grad():
        model.eval()
        device = {key: value for key, value in backend.put_batch(batch).items() if key != "labels"}
        live = model(**device).logits.float().cpu().view(*batch.input_ids.shape, -1)
        opened = AutoModelForCausalLM.from_pretrained(folder / "model")
        ids = torch.from_numpy(batch.input_ids).long()
        exported = opened(input_ids=ids).logits.float()
    end = hashlib.sha256(opened.model.embed_tokens.weight.detach().float().numpy().tobytes()).hexdigest()
    return {
        "largest_difference": (live - exported).abs().max().item(),
        "scale": live.abs().max().item(),
        "trained": start != end,
        "dtype": str(opened.dtype),
    }


def nonfinite(config: RunConfig, name: str, folder: Path) -> dict[str, Any]:
    """A step whose loss is not a number, and the weights and moments before and after it."""
    import torch

    from numina_finetune.models.load import load_model
    from numina_finetune.models.tokenizer import load_tokenizer
    from numina_finetune.train.loss import CausalLoss

    sound = CausalLoss.forward

    def poisoned(self: CausalLoss, **batch: torch.Tensor) -> torch.Tensor:
        return sound(self, **batch) * float("nan")

    backend: Any = _backend(config, name)
    backend.place(load_model(config, load_tokenizer(config)), config)
    first = backend.step([backend.put_batch(_rows(0, 4))], 1e-2)
    before = _digest(backend)
    CausalLoss.forward = poisoned  # type: ignore[method-assign,assignment]
    skipped = backend.step([backend.put_batch(_rows(1, 4))], 1e-2)
    after = _digest(backend)
    CausalLoss.forward = sound  # type: ignore[method-assign]
    last = backend.step([backend.put_batch(_rows(1, 4))], 1e-2)
    metrics = backend.read([first, skipped, last])
    return {"applied": [m.applied for m in metrics], "unchanged": before == after, "moved": _digest(backend) != after}


def reload(config: RunConfig, name: str, folder: Path) -> dict[str, Any]:
    """Place the model and load a checkpoint at once, as a resume does, many times over."""
    from numina_finetune.models.load import load_model
    from numina_finetune.models.tokenizer import load_tokenizer

    backend, tokenizer = _backend(config, name), load_tokenizer(config)
    backend.place(load_model(config, tokenizer), config)
    backend.step([backend.put_batch(_rows(0, 4))], 1e-2)
    shards = _stored(backend, folder)
    saved = _digest(backend)
    loaded = []
    for _ in range(25):
        backend.place(load_model(config, tokenizer), config)
        backend.restore(shards)
        loaded.append(_digest(backend) == saved)
    return {"loaded": loaded}


def uneven(config: RunConfig, name: str, folder: Path) -> dict[str, Any]:
    """One step over eight rows as one batch, and as four micro-batches with very different numbers of labels."""
    import numpy as np

    from numina_finetune.models.load import load_model
    from numina_finetune.models.tokenizer import load_tokenizer

    backend = _backend(config, name)
    rows = _rows(3, 16)
    rows.labels[4:8] = -100
    rows.labels[8:12, 5:] = -100
    metrics = []
    for pieces in (1, 4):
        backend.place(load_model(config, load_tokenizer(config)), config)
        parts = zip(*(np.split(array, pieces) for array in rows), strict=True)
        metrics.append(backend.step([backend.put_batch(type(rows)(*part)) for part in parts], 1e-2))
    whole, cut = backend.read(metrics)
    return {"whole": [whole.loss, whole.grad_norm, whole.supervised], "cut": [cut.loss, cut.grad_norm, cut.supervised]}


def generation(config: RunConfig, name: str, folder: Path) -> dict[str, Any]:
    """Three steps with a generation after each, and without; and the ends of rows."""
    from numina_finetune.models.load import load_model
    from numina_finetune.models.tokenizer import load_tokenizer
    from numina_finetune.train.backend import Decoding

    backend, tokenizer = _backend(config, name), load_tokenizer(config)
    prompts = [[7, 8, 9], [5], list(range(20, 60)), [30, 31], [5]]
    found: dict[str, Any] = {"digests": []}
    for generates in (True, False):
        backend.place(load_model(config, tokenizer), config)
        for seed in range(3):
            backend.step([backend.put_batch(_rows(seed, 4))], 1e-2)
            if generates:
                drawn = Decoding(20, frozenset(), 0, 4, temperature=seed / 2, seed=seed)
                found["drawn"] = backend.generate(prompts, drawn)
        found["digests"].append(_digest(backend))
    found["summary"] = backend.summary()
    backend.place(load_model(config, tokenizer), config, trained=False)
    free = backend.generate(prompts, Decoding(40, frozenset(), 0, 4))
    stop = free[0][10]
    found |= {
        "free": free,
        "stopped": backend.generate(prompts, Decoding(40, frozenset({stop, 500}), 0, 4)),
        "until stop": [row[: row.index(stop) + 1] if stop in row else row for row in free],
        "ended": backend.generate(prompts, Decoding(40, frozenset(), 0, 4), lambda tokens: len(tokens) >= 5),
    }
    return found


def evaluation(config: RunConfig, name: str, folder: Path) -> dict[str, Any]:
    """Batches evaluated at once and one by one, the transfers from the device that it took, and Accelerate's state."""
    from accelerate.utils import DynamoBackend

    from numina_finetune.models.load import load_model
    from numina_finetune.models.tokenizer import load_tokenizer

    backend = _backend(config, name)
    backend.place(load_model(config, load_tokenizer(config)), config)
    batches = [_rows(seed, 4) for seed in range(5)]
    batches[1].labels[:3] = -100
    before = _reads(name)
    whole = backend.evaluate(backend.put_batch(batch) for batch in batches)
    reads = _reads(name) - before
    single = [backend.evaluate([backend.put_batch(batch)]) for batch in batches]
    accelerator = backend.accelerator
    return {
        "whole": whole,
        "single": [sum(loss for loss, _ in single), sum(tokens for _, tokens in single)],
        "none": backend.evaluate([]),
        "labels": int(sum((batch.labels != -100).sum() for batch in batches)),
        "reads": reads,
        "compiled": accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
        "accumulation": accelerator.gradient_state.num_steps,
        "plugins": [getattr(accelerator.state, which, None) for which in ("fsdp_plugin", "deepspeed_plugin")],
    }


def _reads(name: str) -> int:
    if name != "xla":
        return 0
    import torch_xla.debug.metrics as metrics

    data = metrics.metric_data("TransferFromDeviceTime")
    return (int(data[0]) if data else 0) + int(metrics.counter_value("aten::_local_scalar_dense") or 0)


def _backend(config: RunConfig, name: str) -> Any:
    from numina_finetune.cli import backends

    return backends.factory(name)(config)


def _stored(backend: Any, folder: Path) -> Any:
    """The backend's state in files below ``folder``, and the way back to it."""
    from numina_finetune.checkpoint.shards import ShardReader
    from numina_finetune.checkpoint.upload import Captured, upload_host
    from numina_finetune.storage import open_store

    store = open_store(folder)
    index = upload_host(store, "saved/", 0, Captured(backend.snapshot(), {}))
    return ShardReader(store, "saved/", index.files, index.pieces)


def _rows(seed: int, count: int) -> Any:
    import numpy as np

    from numina_finetune.data.loader import Batch

    rng = np.random.default_rng(seed)
    ids = rng.integers(5, 200, (count, 64), dtype=np.int32)
    labels = np.concatenate([ids[:, 1:], np.full((count, 1), -100, np.int32)], axis=1)
    position = np.tile(np.arange(64, dtype=np.int32), (count, 1))
    return Batch(ids, labels, np.ones_like(ids), position)


def _digest(backend: Any) -> str:
    digest = hashlib.sha256()
    for part in backend._state().values():
        for value in part.values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # split by FSDP2
                digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    tell(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]), Path(sys.argv[2]))
