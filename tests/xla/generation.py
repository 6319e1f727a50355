"""Generation on the mesh beside transformers' own ``generate``, in a process of its own.

``python -m tests.xla.generation MESH CASE…``, a case such as ``qwen3,scan`` or ``gpt-oss,unrolled,dropless,lora``, with
``splash`` for JAX's kernel and ``sampled`` for drawn tokens, which are compared with those of a plain decoder. Prints
one JSON object: by case the number of compilations, the number of rows, and the lead of the likeliest token wherever a
row goes another way.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch_xla
from transformers import PreTrainedModel

from numina_finetune.models.generation import PlainDecoder, at_rest
from numina_finetune.train.backend import Decoding
from numina_finetune.train.decoding import decode
from numina_finetune.xla.generation import MeshDecoder
from numina_finetune.xla.placement import StepOptions, place_model
from numina_finetune.xla.runtime import TrafficCounter, build_mesh, start_spmd
from numina_finetune.xla.tensors import RuntimeTensors
from tests.decoding import NEW_TOKENS, PAD, PROMPTS, decoded_model, gaps, generated
from tests.reference import with_adapters

ROWS = 3  # no multiple of 4: filled up


def model_of(case: list[str]) -> PreTrainedModel:
    layers = next((int(word) for word in case if word.isdecimal()), 4)
    model = decoded_model(case[0], layers)
    if "lora" in case:
        with_adapters(model)
    return model.eval()


def main(mesh_text: str, *cases: str) -> dict[str, Any]:
    mesh, shape = build_mesh(mesh_text, start_spmd())
    device, results = torch_xla.device(), {}
    for text in cases:
        case = text.split(",")
        options = StepOptions(
            precision="fp32",
            scan_layers="scan" in case,
            remat="full",
            attention="splash" if "splash" in case else "torch",
            experts=next((form for form in ("dropless", "capacity") if form in case), "dense"),
            expert_capacity=0.5,  # drops about half of what it is sent
        )
        drawn = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 3} if "sampled" in case else {}
        decoding = Decoding(NEW_TOKENS, frozenset(), PAD, ROWS, **drawn)  # type: ignore[arg-type]
        plain = model_of(case)
        if drawn:
            with at_rest(plain):
                found = decode(PlainDecoder(plain), PROMPTS, decoding, None, rows=len(PROMPTS))
            theirs = [found[number] for number in range(len(PROMPTS))]
        else:
            theirs = generated(plain, PROMPTS, NEW_TOKENS)
        placed = place_model(model_of(case), options, mesh, shape, RuntimeTensors(mesh, device))
        torch_xla.sync()
        traffic, decoder = TrafficCounter(), MeshDecoder(placed, device, ROWS)
        ours: list[list[list[int]]] = []
        for seed in (4, 3):
            again = Decoding(NEW_TOKENS, frozenset(), PAD, ROWS, **({**drawn, "seed": seed} if drawn else {}))
            with traffic.generating(), decoder.at_rest():
                found = decode(decoder, PROMPTS, again, None, rows=decoder.rows)
            ours.append([found[number] for number in range(len(PROMPTS))])
        results[text] = {
            "compilations": traffic.generation_compilations,
            "rows": len(PROMPTS),
            "gaps": gaps(plain, PROMPTS, ours[1], theirs),
            "changed": ours[0] != ours[1],
        }
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(*sys.argv[1:])))
