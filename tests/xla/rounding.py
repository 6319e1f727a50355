"""Stochastic rounding on four devices against torch's, in a process of its own: ``python -m tests.xla.rounding``.

Prints one JSON object: whether the bits are the same however the tensor is split, and which operators left XLA.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch_xla
import torch_xla.debug.metrics as metrics
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr

from numina_finetune.train.rounding import stochastic_bf16
from numina_finetune.xla.rounding import StochasticRounding

if __name__ == "__main__":
    xr.use_spmd()
    mesh = xs.Mesh(np.arange(4), (2, 2), ("rows", "columns"))
    xs.set_global_mesh(mesh)
    rounding, same = StochasticRounding("cpu"), []
    value, step = torch.randn(8, 6, 4, generator=torch.Generator().manual_seed(0)) * 0.02, torch.tensor(7.0)
    for spec in ((None, None, None), ("rows", None, "columns"), (None, ("rows", "columns"), None)):
        ours = value.to(torch_xla.device())
        xs.mark_sharding(ours, mesh, spec)
        found = rounding(ours, step.to(torch_xla.device()), 42 * 1_000_003 + 5)
        torch_xla.sync()
        same.append(torch.equal(found.cpu(), stochastic_bf16(value, step, 42 * 1_000_003 + 5)))
    print(
        json.dumps({"same": same, "outside": [name for name in metrics.counter_names() if name.startswith("aten::")]})
    )
