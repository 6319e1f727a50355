"""From a model on the CPU to what is trained on the mesh; with placeholders instead of values, to what is planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch_xla.distributed.spmd as xs
from torch import nn
from transformers import PreTrainedModel

from numina_finetune.config import SHARD_AXES, RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.mesh import MeshShape
from numina_finetune.models.precision import COMPUTE_DTYPES, canonical_name, compute_dtype, widen_routers
from numina_finetune.train.loss import CausalLoss
from numina_finetune.train.optim import decays
from numina_finetune.xla.constraints import Constraints
from numina_finetune.xla.experts import experts_for, keep_scores_split, use_experts
from numina_finetune.xla.loss import cross_entropy_for
from numina_finetune.xla.products import multiply_as_typed
from numina_finetune.xla.remat import enable_gradient_checkpointing
from numina_finetune.xla.scan import ScannedLayers
from numina_finetune.xla.sharding import PartitionSpec, is_of_experts, partition_of, whole
from numina_finetune.xla.splash import attention_for, use_attention
from numina_finetune.xla.stacking import Stacking, stacking_of
from numina_finetune.xla.weights import SplitEmbedding, master_of, present_gathered


class Tensors(Protocol):
    """Where tensors on the mesh come from."""

    def put(self, tensor: torch.Tensor, spec: PartitionSpec) -> torch.Tensor:
        """``tensor`` on the devices, split; no device ever holds all of it."""

    def weight(self, members: Mapping[str, nn.Parameter], spec: PartitionSpec) -> torch.Tensor:
        """The value of a parameter on the devices, split; or of several, stacked to ``[members, …]``.

        Args:
            members: by Hugging Face name; more than one are stacked. Without values (``meta``), they get those that
                are stored for the names.
        """

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, spec: PartitionSpec) -> torch.Tensor:
        """Zeros on the devices, split."""


@dataclass(frozen=True)
class StepOptions:
    """How the step is built; none of it changes what is computed."""

    precision: str
    scan_layers: bool
    remat: str
    attention: str
    """``splash`` or ``torch``."""
    experts: str = "dense"
    """``dropless``, ``capacity`` or ``dense``."""
    expert_capacity: float = 1.25
    platform: str = "cpu"
    """What JAX's functions are made for: ``tpu``, or ``cpu``, where kernels are interpreted."""
    loss_chunks: str = "auto"
    """See :func:`numina_finetune.xla.loss.cross_entropy_for`."""


def step_options(config: RunConfig, model: PreTrainedModel, shape: MeshShape, *, device_type: str) -> StepOptions:
    """What the run's options come to for this model on devices of this type (``TPU``, ``CPU``).

    Raises:
        ConfigError: an option asks for what cannot be had.
    """
    wish, length = config.attention, config.max_seq_length
    attention = attention_for(wish, model.config, length, shape, device_type=device_type)
    return StepOptions(
        precision=config.precision,
        scan_layers=config.scan_layers,
        remat=config.remat,
        attention=attention,
        experts=experts_for(config.experts, model.config, device_type=device_type),
        expert_capacity=config.expert_capacity,
        platform="tpu" if device_type == "TPU" else "cpu",
        loss_chunks=config.loss_chunks,
    )


@dataclass(frozen=True)
class Placed:
    """A model on a mesh, ready for :func:`numina_finetune.xla.step.train_step`."""

    module: CausalLoss
    parameters: Mapping[str, nn.Parameter]
    """By name; equal layers are stacked under names such as ``model.layers.[0::1].mlp.up_proj.weight``."""
    specs: Mapping[str, PartitionSpec]
    """Partition of each parameter, and of the optimizer's moments for it."""
    decayed: frozenset[str]
    """Names of the parameters that are matrices in the model itself."""
    stacking: Stacking | None
    constraints: Constraints


def parameter_shapes(model: nn.Module, stacking: Stacking | None) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter as it is held, by name; a tied one stands once, under its first name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        own = canonical_name(name)
        held = stacking.stacked_name(own) if stacking else own
        shapes[held] = tuple(parameter.shape) if held == own else (stacking.turns, *parameter.shape)  # type: ignore[union-attr]
    return shapes


def parameter_specs(model: PreTrainedModel, shape: MeshShape, stacking: Stacking | None) -> dict[str, PartitionSpec]:
    """Partition of each parameter as it is held, by name; rows of a stack lie as the layer's own weight would.

    Where one dimension is as good as another, all parameters of a shape are split alike. The compiler spreads a scalar
    over all tensors of a shape at once, in one split, and would exchange what it has spread for those split otherwise:
    a square model's query and output matrices (0.95 GB a chip and step for Qwen3-8B on 16 chips).
    """
    specs: dict[str, PartitionSpec] = {}
    alike: dict[tuple[int, ...], PartitionSpec] = {}
    for name, sizes in parameter_shapes(model, stacking).items():
        if stacking is not None and len(stacking.members(name)) > 1:
            specs[name] = (None, *partition_of(model.config.model_type, name, sizes[1:], shape))
        else:
            specs[name] = partition_of(model.config.model_type, name, sizes, shape)
        if shape.tensor == 1 and set(specs[name]) <= {None, SHARD_AXES, "tensor"}:
            specs[name] = alike.setdefault(sizes, specs[name])
    return specs


def stacking_for(model: PreTrainedModel, options: StepOptions) -> Stacking | None:
    """How the model's layers are held."""
    return stacking_of(model.config) if options.scan_layers else None


def place_model(
    model: PreTrainedModel, options: StepOptions, mesh: xs.Mesh, shape: MeshShape, tensors: Tensors
) -> Placed:
    """Give ``model``, on the CPU or without values (``meta``), tensors on the mesh, and arrange it for training there.

    The model is changed in place. Its tensors are made or moved one after another, so that besides what the model has
    in host memory itself there are no more than this host's shards of one tensor, or of one stack.
    """
    multiply_as_typed()
    stacking, dtype = stacking_for(model, options), COMPUTE_DTYPES[options.precision]
    specs, constraints = parameter_specs(model, shape, stacking), Constraints(mesh, shape)
    decayed = frozenset(
        stacking.stacked_name(name) if stacking else name
        for name, parameter in model.named_parameters()
        if decays(name, parameter)
    )
    use_attention(model.config, options.attention, constraints, options.platform)
    use_experts(model.config, options.experts, options.expert_capacity, constraints, options.platform)
    widen_routers(model)
    keep_scores_split(model)
    decoder, head = model.base_model, model.get_output_embeddings()
    placed: dict[str, nn.Parameter] = {}
    if stacking is not None:
        decoder.layers = nn.ModuleList([_scanned(model, stacking, options, specs, constraints, tensors, placed)])
    elif options.remat == "full":
        enable_gradient_checkpointing(model)
    elif options.remat == "dots":
        raise ConfigError(
            "--remat dots on XLA chooses within the loop over layers, and there is none here (--no-scan-layers, or "
            "layers that do not repeat): use full or none"
        )
    stacked, moved = {id(parameter) for parameter in placed.values()}, dict[nn.Parameter, nn.Parameter]()
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) in stacked:
            continue
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if parameter not in moved:
            on_mesh = nn.Parameter(tensors.weight({name: parameter}, specs[name]), parameter.requires_grad)
            moved[parameter] = placed[name] = on_mesh
        if owner is not decoder.embed_tokens:
            # On the CPU, because registering a parametrization ends in Tensor.set_, which freezes an XLA tensor.
            spec = specs.get(name) or next(specs[known] for known, it in placed.items() if it is moved[parameter])
            used = _used_as(name, spec, options)
            present_gathered(owner, leaf, spec, used, compute_dtype(name, dtype), constraints)
            owner, leaf = owner.parametrizations[leaf], "original"  # type: ignore[union-attr,index,assignment]
        # Module.to() would break ties: an XLA tensor cannot be swapped into a CPU parameter in place.
        setattr(owner, leaf, moved[parameter])
    embedding = decoder.embed_tokens
    decoder.embed_tokens = SplitEmbedding(embedding, embedding.weight, dtype, constraints)
    for name, buffer in list(model.named_buffers()):
        owner_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner_name), leaf, tensors.put(buffer, (None,) * buffer.ndim))
    if stacking is None:
        for layer in decoder.layers:
            layer.register_forward_hook(lambda module, arguments, output: constraints(output, "hidden"))
    head_spec = next(specs[name] for name, it in placed.items() if it is master_of(head, "weight"))
    head_weight = master_of(head, "weight")
    loss = cross_entropy_for(options.loss_chunks, head_spec, head_weight, dtype, constraints)
    module = CausalLoss(model, loss)
    return Placed(module, {name: placed[name] for name in specs}, specs, decayed, stacking, constraints)


def _used_as(name: str, spec: PartitionSpec, options: StepOptions) -> PartitionSpec:
    """The partition of a weight in its product: split experts' weights stay as they are, and are gathered there."""
    return spec if options.experts != "dense" and is_of_experts(name) else whole(spec)


def _scanned(
    model: PreTrainedModel,
    stacking: Stacking,
    options: StepOptions,
    specs: Mapping[str, PartitionSpec],
    constraints: Constraints,
    tensors: Tensors,
    placed: dict[str, nn.Parameter],
) -> ScannedLayers:
    """The model's layers as one module; their stacked parameters are added to ``placed``."""
    layers = model.base_model.layers
    prefix = next(name for name, module in model.named_modules() if module is layers)
    weights: dict[str, nn.Parameter] = {}
    own_specs: dict[str, PartitionSpec] = {}
    for place in range(stacking.period):
        for name in [name for name, _ in layers[place].named_parameters()]:
            numbers = range(place, len(layers), stacking.period)
            members = {f"{prefix}.{number}.{name}": layers[number].get_parameter(name) for number in numbers}
            stacked, like = stacking.stacked_name(f"{prefix}.{place}.{name}"), layers[place].get_parameter(name)
            parameter = nn.Parameter(tensors.weight(members, specs[stacked]), requires_grad=like.requires_grad)
            # What is on the devices is not kept on the host as well: 36 layers in fp32 are most of its memory.
            for number in numbers:
                owner, _, leaf = name.rpartition(".")
                setattr(
                    layers[number].get_submodule(owner),
                    leaf,
                    nn.Parameter(like.detach().to("meta"), like.requires_grad),
                )
            placed[stacked] = weights[f"{place}.{name}"] = parameter
            own_specs[f"{place}.{name}"] = specs[stacked][1:]
    return ScannedLayers(
        [layers[place] for place in range(stacking.period)],
        weights,
        own_specs,
        {name: _used_as(name, spec, options) for name, spec in own_specs.items()},
        turns=stacking.turns,
        dtype=COMPUTE_DTYPES[options.precision],
        remat=options.remat,
        constraints=constraints,
    )
