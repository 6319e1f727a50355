"""The next token from its logits: the likeliest, or a drawn one. Shapes are fixed, and nothing is read back.

A draw takes one uniform number a row, made on the host from the seed and the prompt alone, and not a generator on the
device. So it does not depend on the mesh, on the rows decoded beside it, or on the device library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray


def uniforms(prompt: Sequence[int], repeat: int, count: int, seed: int) -> NDArray[np.float32]:
    """``count`` numbers in [0, 1) for the tokens that follow ``prompt``.

    Args:
        repeat: how many equal prompts came before this one; each draws its own numbers.
    """
    digest = hashlib.blake2b(np.asarray([seed, repeat, *prompt], dtype=np.int64).tobytes(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count, dtype=np.float32)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """int32 ``[batch]`` of ``[batch, vocabulary]``."""
    return logits.argmax(dim=-1).int()


def drawn(logits: torch.Tensor, uniform: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
    """A token for each row, by its probability among those that are left.

    First the temperature, then the ``top_k`` likeliest, then of these the fewest that together have ``top_p``: the
    order of transformers' ``generate``.

    Args:
        logits: ``[batch, vocabulary]``, fp32.
        uniform: ``[batch]`` in [0, 1).
        controls: fp32 ``[3]``: temperature over 0, top_p, and top_k, where 0 is all. A tensor, so that other values
            need no other program.

    Returns:
        int32 ``[batch]``.
    """
    temperature, top_p, top_k = controls[0], controls[1], controls[2]
    ordered, tokens = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=logits.device)
    in_top_k = (rank < top_k) | (top_k < 1)
    probabilities = torch.softmax(ordered.masked_fill(~in_top_k, float("-inf")), dim=-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities * ((before < top_p) | (rank == 0)).to(probabilities.dtype)
    reached = probabilities.cumsum(-1)
    # Rounding may leave the last sum under the target: the last one that has any probability is the last choice.
    target = uniform[:, None] * reached[:, -1:]
    chosen = (reached <= target).sum(-1).minimum((probabilities > 0).sum(-1) - 1)
    picked = rank == chosen[:, None]  # compared, not gathered: a gather is split badly over devices
    return torch.where(picked, tokens, 0).sum(-1).int()
