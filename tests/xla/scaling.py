"""The loss on XLA times 1/N, in a process of its own.

``python -m tests.xla.scaling`` prints by form of the loss how many of the bf16 gradients by the hidden states, and by
the bf16 weight, are not those of the loss itself times 1/N, multiplied in fp32 and then rounded.
"""

from __future__ import annotations

import json

import torch
import torch_xla
from torch import nn

from numina_finetune.xla.constraints import Constraints
from numina_finetune.xla.loss import BySequence, ByVocabulary
from numina_finetune.xla.runtime import build_mesh, start_spmd

N = 1370


def main() -> dict[str, list[int]]:
    constraints = Constraints(*build_mesh("fsdp=1", start_spmd()))
    torch.manual_seed(0)
    states, weights = torch.randn(2, 32, 16).bfloat16(), torch.randn(128, 16).bfloat16()
    labels = torch.randint(0, 128, (2, 32), dtype=torch.int32)
    found = {}
    for form in (BySequence, ByVocabulary):
        head = nn.Linear(16, 128, bias=False)
        hidden = states.to(torch_xla.device()).requires_grad_()
        head.weight = nn.Parameter(weights.to(torch_xla.device()))
        rule = form(("tensor", None), torch.bfloat16, constraints, 2 * 32 * 32)
        gradients = []
        for scale in (torch.tensor(1.0), torch.tensor(1 / N)):
            loss = rule(hidden, head, labels.to(torch_xla.device()))
            by = torch.autograd.grad(loss * scale.to(torch_xla.device()), [hidden, head.weight])
            gradients.append([gradient.cpu().float() for gradient in by])
        plain, scaled = gradients
        expected = [(gradient * torch.tensor(1 / N)).bfloat16().float() for gradient in plain]
        found[form.__name__] = [int((ours != theirs).sum()) for ours, theirs in zip(scaled, expected, strict=True)]
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
