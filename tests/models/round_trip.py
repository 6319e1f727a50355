"""Models loaded, placed and exported by the backend that the environment chooses.

``python -m tests.models.round_trip CASE…``; a case is ``FOLDER;OPTION=VALUE;…``: a model's folder and options of the
run. Prints one JSON object of what was found, by case.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numina_finetune import launch
from numina_finetune.config import RunConfig


def main(*cases: str) -> dict[str, dict[str, Any]]:
    name, _ = launch.choose_backend(RunConfig())  # once a process, as the command does
    launch.prepare_environment(name)
    found = {}
    for case in cases:
        folder, *options = case.split(";")
        mapping = dict(option.split("=", 1) for option in options)
        scan = mapping.pop("scan", "true") == "true"
        config = RunConfig.from_mapping(
            {"model_name": folder, "max_seq_length": 64, "scan_layers": scan, "precision": "bf16", **mapping}
        )
        with TemporaryDirectory() as scratch:
            found[case] = round_trip(config, name, Path(folder), Path(scratch))
    return found


def round_trip(config: RunConfig, name: str, source: Path, scratch: Path) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from numina_finetune.models import ranges
    from numina_finetune.models.builtin import TINY_TOKENIZER
    from numina_finetune.models.export import export_model
    from numina_finetune.models.load import load_config, open_model
    from numina_finetune.models.precision import EXPORT_DTYPES, WEIGHT_DTYPES
    from numina_finetune.models.weights import CheckpointWeights
    from tests.train.live import _backend, _stored

    read = 0
    plain = ranges.LocalBytes.read

    def counted(self: ranges.LocalBytes, start: int, end: int) -> torch.Tensor:
        nonlocal read
        read += end - start
        return plain(self, start, end)

    tokenizer, backend = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER)), _backend(config, name)
    ranges.LocalBytes.read = counted  # type: ignore[method-assign]
    try:
        model, weights = open_model(config, tokenizer)
        empty = all(parameter.is_meta for parameter in model.parameters())
        backend.place(model, config, weights)
    finally:
        ranges.LocalBytes.read = plain  # type: ignore[method-assign]
    trained = CheckpointWeights(_stored(backend, scratch / "stored"))
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=WEIGHT_DTYPES[config.precision]).state_dict()
    loaded = {name: trained.read(name) for name in trained.shapes}
    export_model(
        trained,
        scratch / "model",
        config=load_config(config, tokenizer),
        tokenizer=tokenizer,
        generation=GenerationConfig(),
        card="",
        dtype=EXPORT_DTYPES[config.precision],
    )
    opened = AutoModelForCausalLM.from_pretrained(scratch / "model")
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    return {
        "empty": empty,
        "loaded": set(loaded) <= set(expected) and all(same(loaded[name], expected[name]) for name in loaded),
        "exported": opened.state_dict().keys() == original.keys()
        and all(same(tensor, original[name]) for name, tensor in opened.state_dict().items()),
        "opened": f"{type(opened).__name__} {opened.dtype}",
        "read": read,
        "stored": sum(path.stat().st_size for path in source.glob("*.safetensors")),
    }


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    import torch

    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return one.dtype == other.dtype and torch.equal(one.view(bits), other.view(bits))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
