"""What a device's memory holds at least while training, reckoned from shapes: nothing is compiled or loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from numina_finetune.config import RunConfig
from numina_finetune.mesh import MeshShape
from numina_finetune.models.precision import COMPUTE_DTYPES, WEIGHT_DTYPES
from numina_finetune.train.optim import state_bytes

GB = 1e9


@dataclass(frozen=True)
class Estimate:
    """Bytes of one device."""

    trained: int
    """Parameters of the whole model that are trained."""
    frozen: int
    weights: float
    gradients: float
    optimizer: float
    saved: float
    """What the way back needs of the way forward, with ``--remat full``."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.saved

    def lines(self, remat: str) -> Iterator[str]:
        """For a person."""
        frozen = f", {self.frozen:,} frozen" if self.frozen else ""
        yield f"{self.trained:,} parameters are trained{frozen}; a device holds at least {self.total / GB:.3g} GB:"
        yield (
            f"weights {self.weights / GB:.3g} GB, gradients {self.gradients / GB:.3g} GB, "
            f"optimizer {self.optimizer / GB:.3g} GB, layers' inputs {self.saved / GB:.3g} GB"
        )
        more = "" if remat == "full" else f"what --remat {remat} keeps, "
        yield (
            f"not in this: {more}what one layer computes, logits, gathered weights, the compiler's own; "
            "`numina-finetune plan --tpu TYPE` compiles the step and knows them"
        )


def estimate(model: PreTrainedModel, config: RunConfig, rows: int, mesh: MeshShape) -> Estimate:
    """What each device holds.

    Args:
        model: as it is trained, adapters included; only its shapes are read.
        rows: of a micro-batch that a device takes.
        mesh: its ``fsdp``, ``expert`` and ``tensor`` axes split the weights; those too small to be split count as if
            they were.
    """
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    parts = mesh.shards * mesh.tensor
    stored, computed = WEIGHT_DTYPES[config.precision], COMPUTE_DTYPES[config.precision].itemsize
    trained = sizes[True] * stored.itemsize / parts
    shape = model.config
    saved = math.prod((shape.num_hidden_layers, rows, config.max_seq_length, shape.hidden_size, computed))
    return Estimate(
        trained=sizes[True],
        frozen=sizes[False],
        weights=trained + sizes[False] * computed / parts,
        gradients=trained,
        optimizer=state_bytes(dict(model.named_parameters()), config) / parts,
        saved=saved / mesh.tensor,
    )
