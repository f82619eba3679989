"""Sizes of the TPU prefill kernel: tuned ones in JSON by generation (`scripts/tune_tpu.py`), cut down to what a call allows."""

from __future__ import annotations

from qwen_jax.kernels.attention.tpu import Tiling
from qwen_jax.kernels.tpu import alignment
from qwen_jax.kernels.tuned import tuned


def tiling_for(generation: str | None, head_dim: int, capacity: int, chunk_slots: int | None) -> Tiling:
    """The sizes tuned for a generation of TPUs, or the default ones, with a key tile that suits the call.

    Args:
        generation: as `kernels.tpu.generation` names it.
        head_dim: H.
        capacity: slots of the cache: the most a key tile can have.
        chunk_slots: how many of them hold one chunk of dual chunk attention, which the key tile must divide; or None.

    Raises:
        NotImplementedError: the smallest key tile does not fit the cache, or divide chunk_slots.
    """
    entries = tuned(__package__, f"tpu_{generation}", "prefill")
    sizes = [Tiling(**entry["tiling"]) for entry in entries if entry["head_dim"] == head_dim]
    tiling = sizes[0] if sizes else Tiling()
    block_kv = tiling.block_kv
    smallest = 2 * alignment(head_dim)
    while block_kv > smallest and (block_kv > capacity or (chunk_slots and chunk_slots % block_kv)):
        block_kv //= 2
    if block_kv > capacity or (chunk_slots and chunk_slots % block_kv):
        raise NotImplementedError(
            f"needs a cache of at least {smallest} positions and a chunk length that is a multiple of {smallest}, "
            f"got {capacity} and {chunk_slots}"
        )
    subs = max(2, block_kv // tiling.block_compute)
    return Tiling(tiling.block_q, block_kv, block_kv // subs)
