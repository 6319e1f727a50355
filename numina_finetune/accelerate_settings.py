"""What Accelerate's configuration can ask for, and which of it this training does.

``accelerate launch`` hands its options and the file of ``accelerate config`` to the training as environment variables,
and Accelerate and transformers act on them wherever they are imported. Each variable stands in :data:`SETTINGS` with
the values that are understood; any other value is a fault that names our own option. So that nothing else is acted on,
Accelerate is set up while :func:`hidden` keeps the variables from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

from numina_finetune.config import RunConfig

OFF = ("", "0", "f", "false", "n", "no", "off")
ON = ("1", "t", "true", "y", "yes", "on")
ANY = ("*",)

USE_CPU, USE_FSDP = "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP"
_DYNAMO, _DEEPSPEED, _MEGATRON = "ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"
_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")


@dataclass(frozen=True)
class Asked:
    """What a setting is held against."""

    value: str
    """In lower case."""
    options: RunConfig
    backend: str
    """``xla`` or ``native``."""


@dataclass(frozen=True)
class Setting:
    """One variable, or all whose names match a pattern."""

    understood: tuple[str, ...] = ()
    """Values, in lower case, that are honoured or change nothing: under every option."""
    instead: str = ""
    """What to do where the value is not understood; ``{value}`` stands for it."""
    agrees: Callable[[Asked], bool] = lambda asked: False
    """Whether another value is honoured, because the run's own options say the same."""
    switch: str | None = None
    """The variable without which nobody reads this one."""


def _steps(asked: Asked) -> bool:
    options = asked.options
    return options.global_batch_size is None and asked.value == str(options.gradient_accumulation_steps)


def _clipping(asked: Asked) -> bool:
    number = re.fullmatch(r"\d+(\.\d*)?(e-?\d+)?", asked.value)
    return number is not None and float(asked.value) == asked.options.max_grad_norm


def _on_cpu(asked: Asked) -> bool:
    return asked.value in ON and (asked.backend == "native" or os.environ.get("PJRT_DEVICE") == "CPU")


SETTINGS: Mapping[str, Setting] = {
    # --- devices and processes ---
    USE_CPU: Setting(OFF, "leave --cpu (use_cpu) out, or use --backend native", _on_cpu),
    "ACCELERATE_TORCH_DEVICE": Setting((), "choose GPUs with CUDA_VISIBLE_DEVICES or --gpu_ids, the CPU with --cpu"),
    "ACCELERATE_CPU_AFFINITY": Setting((*OFF, *ON), "use true or false"),
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": Setting(("no",), "start one process for each GPU with torchrun"),
    "ACCELERATE_USE_SAGEMAKER": Setting(ANY),
    # --- precision ---
    "ACCELERATE_MIXED_PRECISION": Setting(
        ("no",),
        "set mixed_precision to 'no', and choose with --precision, such as --precision bf16",
        lambda asked: asked.value == asked.options.precision == "bf16",
    ),
    "ACCELERATE_DOWNCAST_BF16": Setting(
        OFF, "leave --downcast_bf16 out: it rounds the master weights; use --precision"
    ),
    "ACCELERATE_FP8_*": Setting(ANY),  # read with mixed_precision fp8 alone
    # --- compilation ---
    _DYNAMO: Setting(
        ("no", ""),
        "set dynamo_backend to 'no', and use --torch-compile with --backend native",
        lambda asked: asked.value == "inductor" and asked.options.torch_compile and asked.backend == "native",
    ),
    "ACCELERATE_DYNAMO_MODE": Setting(("default",), "--torch-compile compiles in the mode 'default'", switch=_DYNAMO),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": Setting(
        OFF, "--torch-compile goes around attention, whose segments differ: leave it out", switch=_DYNAMO
    ),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": Setting(
        OFF, "--torch-compile has one shape, --max-seq-length: leave it out", switch=_DYNAMO
    ),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": Setting(ANY),  # --torch-compile compiles layer by layer
    # --- the step ---
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Setting(
        (),
        "use --gradient-accumulation-steps {value} (without --global-batch-size), or leave gradient_accumulation_steps "
        "out of Accelerate's configuration",
        _steps,
    ),
    "ACCELERATE_GRADIENT_CLIPPING": Setting(
        (), "use --max-grad-norm {value}, or leave gradient_clipping out of Accelerate's configuration", _clipping
    ),
    # --- FSDP ---
    USE_FSDP: Setting(
        OFF,
        "FSDP of Accelerate's configuration is for --backend native: with XLA split the weights by --mesh fsdp=N, and "
        "set distributed_type to 'NO'",
        lambda asked: asked.value in ON and asked.backend == "native",
    ),
    "FSDP_VERSION": Setting(("2",), "set fsdp_version to 2: this is FSDP2", switch=USE_FSDP),
    "FSDP_SHARDING_STRATEGY": Setting(
        ("full_shard", "1"),
        "set it to FULL_SHARD; replicas of split weights are --mesh data=2,fsdp=4, whole weights a configuration of "
        "distributed_type MULTI_GPU",
        switch=USE_FSDP,
    ),
    "FSDP_RESHARD_AFTER_FORWARD": Setting(
        (*ON, "full_shard"),
        "set fsdp_reshard_after_forward to true: a layer's weights are let go after it, to be gathered again",
        switch=USE_FSDP,
    ),
    "FSDP_OFFLOAD_PARAMS": Setting(
        OFF,
        "set fsdp_offload_params to false: weights stay on the GPUs; --mesh fsdp=N over more of them, --lora-rank or "
        "--optim adafactor save memory",
        switch=USE_FSDP,
    ),
    "FSDP_AUTO_WRAP_POLICY": Setting(
        ("transformer_based_wrap",),
        "set fsdp_auto_wrap_policy to TRANSFORMER_BASED_WRAP: each layer is a unit",
        switch=USE_FSDP,
    ),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": Setting(ANY),  # the model's layers are known
    "FSDP_MIN_NUM_PARAMS": Setting(ANY),  # read with SIZE_BASED_WRAP alone
    "FSDP_BACKWARD_PREFETCH": Setting(ANY),  # FSDP2 has one order
    "FSDP_FORWARD_PREFETCH": Setting(OFF, "set fsdp_forward_prefetch to false: FSDP2 has none", switch=USE_FSDP),
    "FSDP_USE_ORIG_PARAMS": Setting(ANY),  # FSDP2 has nothing else
    "FSDP_STATE_DICT_TYPE": Setting(
        ("sharded_state_dict",),
        "set fsdp_state_dict_type to SHARDED_STATE_DICT: checkpoints are kept in shards that any mesh resumes from; "
        "`numina-finetune export` writes whole models",
        switch=USE_FSDP,
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": Setting(ANY),  # each process reads its own parts of the weights
    "FSDP_SYNC_MODULE_STATES": Setting(ANY),
    "FSDP_ACTIVATION_CHECKPOINTING": Setting(
        OFF,
        "use --remat full, or set fsdp_activation_checkpointing to false",
        lambda asked: asked.value in ON and asked.options.remat == "full",
        switch=USE_FSDP,
    ),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": Setting(
        OFF, "set it to false: what --remat full keeps stays on the GPU", switch=USE_FSDP
    ),
    "FSDP_IGNORED_MODULES": Setting(
        (), "leave fsdp_ignored_modules out: all modules are split; --lora-rank freezes weights", switch=USE_FSDP
    ),
    # --- what has no counterpart: nobody reads the details without their switch, which is refused ---
    _DEEPSPEED: Setting(
        OFF,
        "DeepSpeed is not used here: --mesh fsdp=N splits weights, gradients and moments as ZeRO 3 does "
        "(configs/accelerate/multi_gpu_fsdp.yaml)",
    ),
    "ACCELERATE_DEEPSPEED_*": Setting(ANY),
    "ACCELERATE_CONFIG_DS_FIELDS": Setting(ANY),
    _MEGATRON: Setting(
        OFF, "Megatron-LM is not used here: split the model by --mesh, natively fsdp, on XLA also tensor and expert"
    ),
    "MEGATRON_LM_*": Setting(ANY),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Setting(
        OFF, "leave use_parallelism_config out, and use --mesh, such as data=2,fsdp=4 (dp_replicate 2, dp_shard 4)"
    ),
    "PARALLELISM_CONFIG_*": Setting(ANY),
    # --- messages, checks and big-model loading of Accelerate's own ---
    "ACCELERATE_DEBUG_MODE": Setting((*OFF, *ON), "use true or false"),
    "ACCELERATE_ENABLE_RICH": Setting((*OFF, *ON), "use true or false"),
    "ACCELERATE_DISABLE_RICH": Setting(ANY),
    "ACCELERATE_LOG_LEVEL": Setting(ANY),
    "ACCELERATE_DEBUG_RDV_FILE": Setting(ANY),
    "ACCELERATE_IN_TPU_POD": Setting(ANY),
    "ACCELERATE_ALLOW_CP_STANDALONE": Setting(ANY),
    "ACCELERATE_BYPASS_DEVICE_MAP": Setting(ANY),
    "ACCELERATE_INIT_INCLUDE_BUFFERS": Setting(ANY),
}

_ITS_OWN = (USE_CPU, "ACCELERATE_CPU_AFFINITY", "ACCELERATE_DEBUG_MODE", "ACCELERATE_LOG_LEVEL")
"""What Accelerate itself honours, and is left to see."""


def faults(options: RunConfig, backend: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What Accelerate's configuration asks for and this run does not do, one sentence each."""
    found = []
    for name, value in environment.items():
        setting = setting_of(name)
        if setting is None or not _read(setting, environment):
            continue
        asked = Asked(value.lower(), options, backend)
        if setting.understood != ANY and asked.value not in setting.understood and not setting.agrees(asked):
            found.append(f"{name}={value} (Accelerate's) is not honoured: {setting.instead.format(value=value)}")
    return found


def setting_of(name: str) -> Setting | None:
    """What is known of a variable; None where it is none of Accelerate's."""
    if name in SETTINGS:
        return SETTINGS[name]
    return next((setting for pattern, setting in SETTINGS.items() if fnmatchcase(name, pattern)), None)


def asks_for(name: str) -> bool:
    """Whether a variable that turns something on does so."""
    return os.environ.get(name, "").lower() in ON


@contextmanager
def hidden() -> Iterator[None]:
    """Keeps the settings from Accelerate, but those that it honours itself."""
    names = [name for name in os.environ if name.startswith(_PREFIXES) and name not in _ITS_OWN]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(kept)


def _read(setting: Setting, environment: Mapping[str, str]) -> bool:
    return setting.switch is None or environment.get(setting.switch, "").lower() not in OFF
