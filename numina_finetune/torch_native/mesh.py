"""``--mesh`` on the native backend: replicas (DDP) along ``data``, split weights (FSDP2) along ``fsdp``."""

from __future__ import annotations

from numina_finetune import accelerate_settings
from numina_finetune.errors import ConfigError
from numina_finetune.mesh import MeshShape, parse_mesh


def native_mesh(text: str | None, processes: int) -> MeshShape:
    """The mesh that ``text`` names; where it is None, replicas, or FSDP2 where Accelerate's configuration asks for it.

    Raises:
        ConfigError: other axes, a product that is not ``processes``, or not what Accelerate's configuration says.
    """
    wants_fsdp = accelerate_settings.asks_for(accelerate_settings.USE_FSDP)
    shape = parse_mesh(text, processes, default_axis="fsdp" if wants_fsdp else "data")
    if shape.data * shape.fsdp != processes:
        raise ConfigError(
            f"--mesh {text!r}: the native backend has the axes data (replicas) and fsdp (split weights): use "
            f"fsdp={processes} or data={processes}, or --backend xla"
        )
    if wants_fsdp and shape.fsdp == 1 and processes > 1:
        raise ConfigError(
            f"Accelerate's configuration asks for FSDP, --mesh {text!r} for replicas: use fsdp={processes}, or a "
            "configuration of distributed_type MULTI_GPU"
        )
    return shape
