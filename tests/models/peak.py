"""What loading a synthetic gpt-oss checkpoint takes: ``python -m tests.models.peak FOLDER``; a JSON line of bytes.

MXFP4 experts of the 120B's own width, so that a tensor is far larger than anything else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig

from numina_finetune.config import RunConfig
from numina_finetune.models.builtin import TINY_TOKENIZER
from numina_finetune.models.load import load_model

EXPERTS = 8


def write_checkpoint(folder: Path) -> None:
    config = GptOssConfig(vocab_size=1024, num_hidden_layers=1, num_local_experts=EXPERTS, num_attention_heads=8)
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, out = shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, inner // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full((experts, out, inner // 32), 120, dtype=torch.uint8)
        else:
            tensors[name] = torch.randn(shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines[field].split()[0]) * 1024


def main(folder: Path) -> dict[str, int]:
    if not (folder / "config.json").exists():
        # In a child, whose memory is gone with it: what the allocator keeps would hide what loading takes.
        import multiprocessing

        child = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(folder,))
        child.start()
        child.join()
    tokenizer = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))
    import transformers.models.gpt_oss.modeling_gpt_oss  # noqa: F401

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    model = load_model(RunConfig(model_name=str(folder), precision="pure-bf16"), tokenizer)
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    return {"peak": resident("VmHWM") - before, "model": sum(sizes), "largest": max(sizes)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
