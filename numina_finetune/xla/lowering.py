"""From lazy tensors to a StableHLO module that the TPU's compiler takes.

The inputs are cloned before the step is traced, and the clones are the first outputs: so they become the module's
parameters 0, 1, …, in order. The clones are then dropped from the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch_xla

from numina_finetune.mesh import MeshShape
from numina_finetune.xla.sharding import PartitionSpec

REPLICATED = "{replicated}"


def sharding_text(spec: PartitionSpec, mesh: MeshShape) -> str:
    """XLA's own text for a partition over a mesh whose devices are numbered in the order of its axes."""
    sizes = [(axis, size) for axis, size in mesh.by_axis.items() if size > 1]
    position = {axis: index for index, (axis, _) in enumerate(sizes)}
    tiles, order = [], []
    for entry in spec:
        axes = [axis for axis in ((entry,) if isinstance(entry, str) else entry or ()) if axis in position]
        tiles.append(math.prod(mesh.by_axis[axis] for axis in axes))
        order += [position[axis] for axis in axes]
    if not order:
        return REPLICATED
    rest = [index for index in range(len(sizes)) if index not in order]
    tail = ""
    if rest:
        tiles.append(math.prod(sizes[index][1] for index in rest))
        tail = " last_tile_dim_replicate"
    permutation = order + rest
    if permutation == sorted(permutation):
        numbers = f"[{math.prod(tiles)}]"
    else:
        numbers = f"[{','.join(str(size) for _, size in sizes)}]T({','.join(map(str, permutation))})"
    return f"{{devices=[{','.join(map(str, tiles))}]<={numbers}{tail}}}"


def stablehlo(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    shardings: Sequence[str],
    donated: Mapping[int, int],
) -> bytes:
    """The portable module that computes ``outputs`` from ``inputs``.

    Args:
        inputs: clones, made before anything was computed from them.
        shardings: of the inputs.
        donated: input number to the number of the output that takes its memory.
    """
    proto = torch_xla._XLAC._get_xla_tensors_hlo_proto([*inputs, *outputs])
    return _annotated(proto, len(inputs), shardings, donated)


def _annotated(proto: bytes, count: int, shardings: Sequence[str], donated: Mapping[int, int]) -> bytes:
    from jax._src.interpreters import mlir as jax_mlir
    from jaxlib import _jax, xla_client
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import func

    text = _jax.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(proto))
    with jax_mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        main = next(op for op in module.body.operations if ir.StringAttr(op.attributes["sym_name"]).value == "main")
        returned = list(main.regions[0].blocks[0].operations)[-1]
        values, wrapped = list(returned.operands), None
        if len(values) == 1 and str(values[0].type).startswith("tuple"):
            wrapped = values[0].owner
            values = list(wrapped.operands)
        for index, value in enumerate(values[:count]):
            if not isinstance(value.owner, ir.Block) or ir.BlockArgument(value).arg_number != index:
                raise RuntimeError(f"input {index} of the traced step is not parameter {index} of its module")
        kept = values[count:]
        with ir.InsertionPoint(returned):
            func.ReturnOp(kept)
        returned.operation.erase()
        if wrapped is not None:
            wrapped.operation.erase()
        function = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
        main.attributes["function_type"] = ir.TypeAttr.get(
            ir.FunctionType.get(function.inputs, [value.type for value in kept])
        )
        if "res_attrs" in main.attributes:
            del main.attributes["res_attrs"]
        attributes = []
        for index in range(len(function.inputs)):
            entry = {"mhlo.sharding": ir.StringAttr.get(shardings[index] if index < count else REPLICATED)}
            if index in donated:
                entry["tf.aliasing_output"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), donated[index])
            attributes.append(ir.DictAttr.get(entry))
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(attributes)
        for name in ("parameter_layouts", "result_layout"):
            name = f"mhlo.xla_entry_computation_{name}"
            if name in module.operation.attributes:
                del module.operation.attributes[name]
        module.operation.verify()
        return _portable(module)


def _portable(module: object) -> bytes:
    """Text with its locations: read alike by this jaxlib and by a newer one, and it keeps where each op is from."""
    return str(module.operation.get_asm(enable_debug_info=True)).encode()  # type: ignore[attr-defined]
