"""Sizes of the TPU prefill kernel: one choice for all generations (docs/tpu.md), cut down to what a call allows."""

from __future__ import annotations

from qwen_jax.kernels.attention.tpu import Tiling
from qwen_jax.kernels.tpu import SUBLANES_BF16


def tiling_for(capacity: int, chunk_slots: int | None) -> Tiling:
    """The default sizes, with a key tile that suits the call.

    Args:
        capacity: slots of the cache, a multiple of 16: the most a key tile can have.
        chunk_slots: how many of them hold one chunk of dual chunk attention, which the key tile must divide; or None.

    Raises:
        NotImplementedError: no key tile of at least 32 keys divides chunk_slots.
    """
    tiling = Tiling()
    block_kv = tiling.block_kv
    smallest = 2 * SUBLANES_BF16
    while block_kv > smallest and (block_kv > capacity or (chunk_slots and chunk_slots % block_kv)):
        block_kv //= 2
    if block_kv > capacity or (chunk_slots and chunk_slots % block_kv):
        raise NotImplementedError(
            f"needs a cache of at least {smallest} positions and a chunk length that is a multiple of {smallest}, "
            f"got {capacity} and {chunk_slots}"
        )
    subs = max(2, block_kv // tiling.block_compute)
    return Tiling(tiling.block_q, block_kv, block_kv // subs)
