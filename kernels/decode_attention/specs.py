"""Sizes of the decode kernel: tuned ones in JSON by device, a rule for the rest."""

from __future__ import annotations

import jax

from qwen_jax.kernels.decode_attention.split import Problem, Tiling
from qwen_jax.kernels.tuned import tuned


def tiling_for(problem: Problem, chunk_len: int | None, device_kind: str | None = None) -> Tiling:
    """The tuned sizes for this problem on this device (default: the first), or the rule's where none fit.

    chunk_len: s of dual chunk attention, which the key tile must divide, or None.
    """
    for entry in tuned(__package__, device_kind or jax.devices()[0].device_kind, "decode"):
        if (entry["head_dim"], entry["cache"]) == (problem.head_dim, problem.cache):
            tiling = Tiling(**entry["tiling"])
            if not chunk_len or chunk_len % tiling.block_kv == 0:
                return tiling
    if problem.quantised:
        blocks = problem.blocks.size if problem.blocks else 128
        block_kv = 64 if (chunk_len or 0) % 128 or blocks % 128 else 128
        return Tiling(block_kv, 3 * 128 // block_kv, walks=2)
    return Tiling(block_kv=64, stages=4)
