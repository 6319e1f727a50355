"""JAX functions inside a PyTorch/XLA program: lowered once for each shape, and called as one operation."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
from torch_xla._internal.jax_workarounds import jax_env_context, jax_import_guard


class JaxPrograms:
    """What was lowered so far, for one platform (``tpu``, ``cpu``)."""

    def __init__(self, platform: str) -> None:
        self._platform = platform
        self._computations: dict[Any, Any] = {}

    def call(
        self, name: str, make: Callable[[], Callable[..., Any]], key: Hashable, tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Call the function that ``make()`` gives, of arrays and giving a tuple of arrays, with ``tensors``.

        Args:
            name: of the operation in the program.
            key: equal for equal functions; ``make`` is asked once for each key and each set of shapes and types.
        """
        kinds = tuple((tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for tensor in tensors)
        known = name, key, kinds
        if known not in self._computations:
            jax_import_guard()  # torch_xla takes the TPU before JAX does
            with jax_env_context():
                from numina_finetune.xla.jax_lowering import lower

                program = lower(make(), kinds, self._platform)
            self._computations[known] = xb.computation_from_module_proto(name, program)
        results: list[torch.Tensor] = torch_xla._XLAC._xla_user_computation(
            f"numina::{name}", tuple(tensors), self._computations[known]
        )
        return results
