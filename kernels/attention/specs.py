"""Sizes of the prefill kernel: tuned ones in JSON by device, a rule for the rest."""

from __future__ import annotations

import jax

from qwen_jax.kernels.attention.hopper import Problem, Tiling
from qwen_jax.kernels.tuned import tuned


def tiling_for(problem: Problem, chunk_len: int | None, device_kind: str | None = None) -> Tiling:
    """The tuned sizes for this problem on this device (default: the first), or the rule's where none fit.

    chunk_len: s of dual chunk attention, which the key tile must divide, or None.
    """
    for entry in tuned(__package__, device_kind or jax.devices()[0].device_kind, "prefill"):
        if entry["head_dim"] == problem.head_dim:
            tiling = Tiling(**{**entry["tiling"], "registers": tuple(entry["tiling"]["registers"])})
            if not chunk_len or chunk_len % tiling.block_kv == 0:
                return tiling
    block_kv = 128 if not chunk_len or chunk_len % 128 == 0 else 64
    return Tiling(block_kv=block_kv, stages=256 // block_kv)
