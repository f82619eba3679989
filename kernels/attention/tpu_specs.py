"""Sizes of the TPU prefill kernel: tuned ones in JSON by generation, cut down to what a call allows."""

from __future__ import annotations

import functools
import json
from importlib import resources

from qwen_jax.kernels.attention.tpu import Tiling
from qwen_jax.kernels.tpu import SUBLANES_BF16, generation, target


def tiling_for(capacity: int, head_dim: int, chunk_len: int | None, device_kind: str | None = None) -> Tiling:
    """The tuned sizes for this generation (default: of `kernels.tpu.target`), with a key tile that suits the call.

    Args:
        capacity: positions of the cache, a multiple of 16: the most a key tile can have.
        head_dim: 64 or 128.
        chunk_len: s of dual chunk attention, which the key tile must divide, or None.
        device_kind: as JAX names it.

    Raises:
        NotImplementedError: no key tile of at least 32 keys divides chunk_len.
    """
    tuned = _tuned(generation(device_kind or target()) or "")
    tiling = next((Tiling(**e["tiling"]) for e in tuned if e["head_dim"] == head_dim), Tiling())
    block_kv = tiling.block_kv
    smallest = 2 * SUBLANES_BF16
    while block_kv > smallest and (block_kv > capacity or (chunk_len and chunk_len % block_kv)):
        block_kv //= 2
    if block_kv > capacity or (chunk_len and chunk_len % block_kv):
        raise NotImplementedError(
            f"needs a cache of at least {smallest} positions and a chunk length that is a multiple of {smallest}, "
            f"got {capacity} and {chunk_len}"
        )
    subs = max(2, block_kv // tiling.block_compute)
    return Tiling(tiling.block_q, block_kv, block_kv // subs)


@functools.cache
def _tuned(name: str) -> list[dict]:
    """What `scripts/tune_tpu.py` found for a generation; nothing for one it has not seen."""
    file = resources.files(__package__).joinpath("tuned", f"tpu_{name}.json")
    return json.loads(file.read_text())["prefill"] if file.is_file() else []
