"""The step's loss and gradients on XLA beside plain transformers', in a process of its own.

``python -m tests.xla.agreement DTYPE MESH ATTENTION CASE…``, a case such as ``scan,dots``, ``unrolled,full`` or
``scan,full,8 experts,dropless`` (gpt-oss), with ``lora`` beside PEFT's own modules. Prints one JSON object: by case the
relative difference of the loss, the largest relative L2 difference of a gradient tensor, how many matrix products
the program of the gradients has, and how many of them a TPU would make of operands rounded to bf16. The logits are cut
small, into several chunks, but for a case of ``whole``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.qwen3 import modeling_qwen3

from numina_finetune.mesh import MeshShape, parse_mesh
from numina_finetune.models import precision
from numina_finetune.models.attention import SEGMENT_ATTENTION
from numina_finetune.models.experts import STATIC_EXPERTS
from numina_finetune.xla import loss as loss_module
from numina_finetune.xla.placement import StepOptions, place_model
from numina_finetune.xla.runtime import BATCH_SPEC, build_mesh, start_spmd
from numina_finetune.xla.tensors import RuntimeTensors
from tests.reference import (
    LENGTH,
    ROWS,
    VOCABULARY,
    Batch,
    fill_randomly,
    gpt_oss_config,
    packed_rows,
    peft_reference,
    qwen3_config,
    reference,
    with_adapters,
)


def tiny(layers: int, dtype: torch.dtype, tied: bool, experts: int = 0) -> PreTrainedModel:
    if experts:
        sparse = AutoModelForCausalLM.from_config(
            gpt_oss_config(experts, layers),
            dtype=dtype,
            attn_implementation=SEGMENT_ATTENTION,
            experts_implementation=STATIC_EXPERTS,
        )
        fill_randomly(sparse)
        return sparse
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        qwen3_config(layers, tied=tied), dtype=dtype, attn_implementation=SEGMENT_ATTENTION
    )


def ours(
    model: PreTrainedModel, batch: Batch, options: StepOptions, mesh: xs.Mesh, shape: MeshShape
) -> tuple[float, dict[str, torch.Tensor], list[str]]:
    placed = place_model(model, options, mesh, shape, RuntimeTensors(mesh, torch_xla.device()))
    rows = {name: tensor.to(torch_xla.device()) for name, tensor in batch.items()}
    for tensor in rows.values():
        xs.mark_sharding(tensor, mesh, BATCH_SPEC)
    loss = placed.module.train()(**rows)
    torch.autograd.backward(loss)
    found = {name: p.grad for name, p in placed.parameters.items() if p.grad is not None}
    program = torch_xla._XLAC._get_xla_tensors_hlo([loss, *found.values()])
    torch_xla.sync()
    gradients = {}
    for name, gradient in found.items():
        members = placed.stacking.members(name) if placed.stacking else [name]
        on_host = gradient.cpu()
        gradients |= dict(zip(members, on_host if len(members) > 1 else [on_host], strict=True))
    return loss.detach().item(), gradients, [line for line in program.splitlines() if " dot(" in line]


def keep_double() -> None:
    """transformers computes norms and positions in fp32, whatever the model's type: both sides here do not."""

    def norm(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden * scale)

    def rotary(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
        both = torch.cat([angles, angles], dim=-1)
        return both.cos(), both.sin()

    modeling_qwen3.Qwen3RMSNorm.forward = norm
    modeling_qwen3.Qwen3RotaryEmbedding.forward = rotary


def main(dtype_name: str, mesh_text: str, attention: str, *cases: str) -> dict[str, Any]:
    mesh, shape = build_mesh(mesh_text, start_spmd())
    assert shape == parse_mesh(mesh_text, int(xr.global_runtime_device_count()))
    dtype = torch.float64 if dtype_name == "fp64" else torch.float32
    precision.COMPUTE_DTYPES[dtype_name] = dtype
    if dtype_name == "fp64":
        keep_double()
    batch, results = packed_rows(), {}
    for case in cases:
        form, remat, *more = case.split(",")
        layers, tied = int(next((m for m in more if m.isdecimal()), "4")), "untied" not in more
        experts = next((int(m.removesuffix(" experts")) for m in more if m.endswith(" experts")), 0)
        model, plain = tiny(layers, dtype, tied, experts), tiny(layers, dtype, tied, experts)
        if "lora" in more:
            loss, gradients = peft_reference(plain, model, with_adapters(model), batch)
        else:
            loss, gradients = reference(plain, batch)
        elements = ROWS * LENGTH * VOCABULARY // 24 if "whole" not in more else ROWS * LENGTH * VOCABULARY * 2
        loss_module.ChunkedCrossEntropy.__init__.__defaults__ = (elements,)  # type: ignore[misc]
        chunks = next((m for m in more if m in ("sequence", "vocabulary")), "auto")
        form_of_experts = next((m for m in more if m in ("dropless", "capacity")), "dense")
        options = StepOptions(
            precision=dtype_name,
            scan_layers=form == "scan",
            remat=remat,
            attention=attention,
            experts=form_of_experts,
            expert_capacity=float(experts or 1),  # room for all tokens at one expert
            loss_chunks=chunks,
        )
        our_loss, our_gradients, products = ours(model, batch, options, mesh, shape)
        assert our_gradients.keys() == gradients.keys()
        differences = [
            ((our_gradients[name] - gradient).norm() / gradient.norm()).item() for name, gradient in gradients.items()
        ]
        rounded = [line for line in products if "operand_precision={highest,highest}" not in line]
        results[case] = [abs(our_loss / loss - 1), max(differences), len(products), len(rounded)]
    return results


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
