"""LoRA adapters: PEFT's, held so that every weight keeps its own name.

PEFT chooses what is adapted, makes the adapters and gives them their first values, and the exported files have its
names. Its wrappers do not stay in the model. They rename the weights that they wrap (``q_proj.base_layer.weight``),
while streaming, sharding and stacking go by the model's own names; and the one for experts registers a parametrization
in each forward pass, which cannot be done to a layer that is called with its weights handed in (a scanned one) or whose
weights are parametrized already (mixed precision).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from numina_finetune.config import RunConfig
from numina_finetune.errors import ConfigError
from numina_finetune.models.experts import ADAPTERS
from numina_finetune.models.hub import alias_of
from numina_finetune.models.precision import WEIGHT_DTYPES

if TYPE_CHECKING:  # PEFT takes seconds to import, and most runs have no adapters
    from peft import LoraConfig

ALL_LINEAR = "all-linear"
_ATTENTION = {name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
_DENSE = _ATTENTION | {name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
_EXPERTS = _ATTENTION | {name: f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
TARGETS: Mapping[str, Mapping[str, str]] = {"qwen3": _DENSE, "llama": _DENSE, "gpt_oss": _EXPERTS}
"""By ``model_type``: what may have adapters, and where in a layer it is; of experts, a parameter."""

_LINEAR_ADAPTER = re.compile(r"\.lora_(?P<which>[AB])\.weight$")
_EXPERT_ADAPTER = re.compile(rf"\.{ADAPTERS}\.(?P<parameter>\w+)\.lora_(?P<which>[AB])$")


class LoraLinear(nn.Linear):
    """A linear layer and its adapter; the result is ``x Wᵀ + b + scale · (x Aᵀ) Bᵀ``.

    A and B are no modules that are called: what a linear layer gives may be kept for the backward pass
    (``--remat dots``), and theirs is not worth it.
    """

    def __init__(self, base: nn.Linear, lora_A: nn.Module, lora_B: nn.Module, scale: float) -> None:  # noqa: N803
        """
        Args:
            base: whose parameters this layer takes over, ``[out, in]``.
            lora_A, lora_B: with a ``weight`` each, ``[rank, in]`` and ``[out, rank]``.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B, self.scale = lora_A, lora_B, scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[…, in]`` to ``[…, out]``."""
        low: torch.Tensor = nn.functional.linear(input, self.lora_A.weight)  # type: ignore[arg-type]
        added = nn.functional.linear(low, self.lora_B.weight)  # type: ignore[arg-type]
        return super().forward(input) + added * self.scale


class ExpertAdapter(nn.Module):
    """What is added to one fused parameter of all experts; a product of two matrices for each."""

    def __init__(self, lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float) -> None:  # noqa: N803
        """
        Args:
            lora_A: ``[experts · rank, in]``, expert after expert.
            lora_B: ``[out, rank · experts]``, the experts of one rank side by side, as PEFT has them.
        """
        super().__init__()
        self.lora_A, self.lora_B, self.scale = nn.Parameter(lora_A), nn.Parameter(lora_B), scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight + scale · A B``, ``[experts, in, out]`` as the parameter itself."""
        left, right = _factors(self.lora_A, self.lora_B, weight.shape[0])
        return torch.baddbmm(weight, left, right, alpha=self.scale)


def lora_faults(config: RunConfig, model_type: str) -> list[str]:
    """What is wrong with ``--lora-targets`` for a model of this architecture."""
    known = TARGETS.get(model_type, {})
    if not config.lora_rank or config.lora_targets == ALL_LINEAR:
        return []
    unknown = [name for name in _names(config) if name not in known]
    return [
        f"--lora-targets {name!r} is nothing that a {model_type} model has: use {ALL_LINEAR}, or some of "
        f"{', '.join(known)}"
        for name in unknown
    ]


def lora_config(config: RunConfig, model_type: str) -> LoraConfig:
    """The run's adapters, as PEFT describes them.

    Raises:
        ConfigError: ``--lora-targets`` names what this architecture has not.
    """
    from peft import LoraConfig, TaskType

    if faults := lora_faults(config, model_type):
        raise ConfigError(faults)
    known = TARGETS[model_type]
    targets = [known[name] for name in (known if config.lora_targets == ALL_LINEAR else _names(config))]
    described = LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        target_modules=[name for name in targets if ".experts." not in name],
        target_parameters=[name for name in targets if ".experts." in name] or None,
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=alias_of(config.model_name),
        revision=config.model_revision,
    )
    described.target_modules = sorted(described.target_modules or ())  # PEFT makes a set of them, written in any order
    return described


def add_adapters(model: PreTrainedModel, config: RunConfig, *, values: bool = True) -> dict[str, str]:
    """Freeze ``model``, on the CPU or without values (``meta``), and give it trained adapters, in place.

    Their first values depend on ``--seed`` alone; they change nothing of what the model computes.

    Args:
        values: False leaves adapters of a model without values without them as well.

    Returns:
        PEFT's name of each adapter's parameter, by the one that it has in the model.

    Raises:
        ConfigError: ``--lora-targets`` names what this architecture has not.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    described = lora_config(config, model.config.model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(described, model)
        wrappers = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, LoraLayer) and not path.endswith(".base_layer")
        ]
        torch.manual_seed(config.seed)  # the injection draws numbers only where the model has values
        names: dict[str, str] = {}
        for path, wrapper in wrappers:
            if values:
                for one in _around(wrapper):
                    _materialise(one)
            names |= _adopt(model, path, wrapper, config)
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_()
    del model.peft_config  # PEFT's mark of a model with its wrappers in it
    return names


def adapted_weight(name: str) -> tuple[str, str] | None:
    """The weight that the parameter ``name`` adapts, and ``A`` or ``B``; None where it is no adapter's."""
    if match := _LINEAR_ADAPTER.search(name):
        return f"{name[: match.start()]}.weight", match["which"]
    if match := _EXPERT_ADAPTER.search(name):
        return f"{name[: match.start()]}.{match['parameter']}", match["which"]
    return None


def adapters_by_weight(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each adapted weight the names of its adapter's parameters, ``A`` and ``B``."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if adapted := adapted_weight(name):
            found.setdefault(adapted[0], {})[adapted[1]] = name
    return found


def merged(
    weight: torch.Tensor,
    lora_A: torch.Tensor,  # noqa: N803
    lora_B: torch.Tensor,  # noqa: N803
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``weight`` with what its adapter adds, summed in fp32 and then cast; of experts, one after another.

    Args:
        weight: ``[out, in]`` of a linear layer, or ``[experts, in, out]``.
        lora_A: what the input is multiplied by, see :class:`LoraLinear` and :class:`ExpertAdapter`.
        lora_B: what its product is multiplied by.
    """
    if weight.ndim == 2:
        return torch.addmm(weight.float(), lora_B.float(), lora_A.float(), alpha=scale).to(dtype)
    result = torch.empty(weight.shape, dtype=dtype)
    left, right = _factors(lora_A, lora_B, weight.shape[0])
    for expert, own in enumerate(weight):
        result[expert] = torch.addmm(own.float(), left[expert].float(), right[expert].float(), alpha=scale)
    return result


def _names(config: RunConfig) -> list[str]:
    """Of ``--lora-targets``, once each; ``mlp.experts.down_proj`` is as good as ``down_proj``."""
    return list(dict.fromkeys(name.strip().rpartition(".")[2] for name in config.lora_targets.split(",")))


def _adopt(model: nn.Module, path: str, wrapper: Any, config: RunConfig) -> dict[str, str]:
    """Put a module of ours where PEFT's wrapper stands; PEFT's names of the adapters' parameters, by ours."""
    from peft.tuners.lora import ParamWrapper

    owner, _, leaf = path.rpartition(".")
    names: dict[str, str] = {}
    adapters: dict[str, nn.Module] = {}
    theirs = path
    while isinstance(wrapper, ParamWrapper):  # one around the other, for each parameter
        lora_A, lora_B = _factors_of(wrapper, config)  # noqa: N806
        adapters[wrapper.parameter_name] = ExpertAdapter(lora_A.weight, lora_B.weight, config.lora_scale)
        for which in "AB":
            ours = f"{path}.{ADAPTERS}.{wrapper.parameter_name}.lora_{which}"
            names[ours] = f"{theirs}.lora_{which}.weight"
        wrapper, theirs = wrapper.base_layer, f"{theirs}.base_layer"
    if adapters:
        setattr(wrapper, ADAPTERS, nn.ModuleDict(dict(reversed(adapters.items()))))
        held = wrapper
    else:
        held = LoraLinear(wrapper.base_layer, *_factors_of(wrapper, config), config.lora_scale)
        names = {f"{path}.lora_{which}.weight": f"{path}.lora_{which}.weight" for which in "AB"}
    setattr(model.get_submodule(owner), leaf, held)
    return names


def _around(wrapper: Any) -> Iterator[Any]:
    """PEFT's wrappers at one place: of experts, one around the other for each parameter."""
    from peft.tuners.lora import LoraLayer

    while isinstance(wrapper, LoraLayer):
        yield wrapper
        wrapper = wrapper.base_layer


def _materialise(wrapper: Any) -> None:
    """Memory on the CPU for the adapter in PEFT's wrapper, where it was made like the frozen weight: without."""
    (name,) = wrapper.lora_A
    for module in (wrapper.lora_A[name], wrapper.lora_B[name]):
        if module.weight.is_meta:
            module.to_empty(device="cpu")


def _factors_of(wrapper: Any, config: RunConfig) -> tuple[nn.Linear, nn.Linear]:
    """The adapter in PEFT's wrapper, in the type that trained weights have.

    PEFT makes it in the type of the frozen weight: its first values are made once more, so that they are not rounded.
    """
    (name,) = wrapper.lora_A
    wrapper.lora_A[name].float()
    wrapper.lora_B[name].float()
    wrapper.reset_lora_parameters(name, True)
    dtype = WEIGHT_DTYPES[config.precision]
    return wrapper.lora_A[name].to(dtype), wrapper.lora_B[name].to(dtype)


def _factors(lora_A: torch.Tensor, lora_B: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: N803
    """Each expert's own: ``[experts, in, rank]`` and ``[experts, rank, out]``."""
    left = lora_A.reshape(experts, -1, lora_A.shape[1]).transpose(1, 2)
    right = lora_B.reshape(lora_B.shape[0], -1, experts).permute(2, 1, 0)
    return left, right
