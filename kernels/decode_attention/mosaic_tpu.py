"""Decode attention on TPUs: what the Mosaic TPU kernel serves, how a call is laid out for it, the merge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels import quantised
from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.decode_attention.tpu import QUERY_ROWS, Problem, decode
from qwen_jax.kernels.merge import merge
from qwen_jax.kernels.mixing import unmix
from qwen_jax.kernels.tpu import LANES, LOG2E, alignment, as_it_lies, generation, target, why_not_tpu
from qwen_jax.rope import Rotary, temperature

_TILE_BYTES = 2**20  # of keys, all KV heads: long enough that a copy runs at the memory's speed
_CORES = {"v5p": 2}  # where one device is two cores


def decode_attend(
    q_BNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    *,
    layer: jax.Array | int,
    position_B: jax.Array,
    prompt_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    k_scale_LBKS: jax.Array | None = None,
    v_scale_LBKS: jax.Array | None = None,
    share: Share | None = None,
    block_kv: int | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.decode_attention.api.decode_attend`. K and V must be finite to the end of a key tile.

    Args:
        block_kv: keys a tile; None for about 1 MiB of them.
        interpret: parameters of jax's TPU interpreter, to run without a TPU.

    Raises:
        NotImplementedError: not a TPU, or shapes and dtypes the kernel does not serve.
    """
    if not interpret and (reason := why_not_tpu()):
        raise NotImplementedError(reason)
    if reason := refusal(q_BNH, k_LBKSH, v_LBKSH, k_scale_LBKS, v_scale_LBKS):
        raise NotImplementedError(reason)
    B, N, H = q_BNH.shape
    K, S = k_LBKSH.shape[2:4]
    G = N // K
    problem = Problem(
        versions=len(rotary.stages),
        batch=B,
        kv_heads=K,
        rows=-(-G // QUERY_ROWS) * QUERY_ROWS,
        capacity=S,
        head_dim=H,
        original=rotary.dca.original_max_position_embeddings if rotary.dca else 0,
        cache=str(k_LBKSH.dtype),
        shares=_CORES.get(generation(target()) or "", 1),
        blocks=share.blocks if share else None,
    )
    share = share or EVERYTHING
    chunk_slots = rotary.chunk_len and rotary.chunk_len // share.blocks.count
    block_kv = block_kv or tile_for(problem, chunk_slots)
    if chunk_slots and chunk_slots % block_kv:
        raise NotImplementedError(
            f"a chunk of {chunk_slots} keys is not a multiple of the key tile {block_kv}"
        )
    position_B, prompt_len_B = (jnp.asarray(x, jnp.int32) for x in (position_B, prompt_len_B))
    query_B = jnp.maximum(position_B, 0)
    stages = (share.below(x) // block_kv for x in rotary.stage_starts(query_B))
    tiles_B = -(-jnp.minimum(share.below(position_B + 1), S) // block_kv)
    warmth_B = temperature(prompt_len_B, problem.original)
    factor_B = scale_B.astype(jnp.float32) * LOG2E * warmth_B
    q_B1NH = q_BNH.astype(jnp.float32)[:, None]
    q_BPNH = jnp.concatenate(list(rotary.query_stages(q_B1NH, query_B[:, None], scale_B=factor_B)), axis=1)
    q_BPKRH = jnp.pad(
        q_BPNH.astype(q_BNH.dtype).reshape(B, problem.versions, K, G, H),
        ((0, 0), (0, 0), (0, 0), (0, problem.rows - G), (0, 0)),
    )
    out_BCKRH, lse = decode(problem, block_kv, q_BNH.dtype, interpret)(
        jnp.stack([jnp.asarray(layer, jnp.int32), jnp.asarray(share.rank, jnp.int32)]),
        jnp.stack([position_B, prompt_len_B, *stages, tiles_B], axis=1).reshape(-1),
        warmth_B,
        q_BPKRH,
        as_it_lies(k_LBKSH),
        as_it_lies(v_LBKSH),
        *(x.astype(jnp.float32) for x in (k_scale_LBKS, v_scale_LBKS) if x is not None),
    )
    out_BKGH, lse_BKG = merge(out_BCKRH[:, :, :, :G], lse[:, :, :, :G, 0], axis=1)
    out_BKGH = unmix(out_BKGH) if v_scale_LBKS is not None else out_BKGH
    return out_BKGH.reshape(B, N, H).astype(q_BNH.dtype), lse_BKG.reshape(B, N)


def refusal(
    q_BNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    k_scale_LBKS: jax.Array | None = None,
    v_scale_LBKS: jax.Array | None = None,
) -> str | None:
    """Why the kernel cannot serve these shapes and dtypes, or None."""
    capacity, head_dim = k_LBKSH.shape[3:]
    cache = k_LBKSH.dtype
    known = (jnp.dtype(jnp.bfloat16), *quantised.DTYPES)
    if q_BNH.dtype != jnp.bfloat16 or v_LBKSH.dtype != cache or cache not in known:
        got = f"{q_BNH.dtype}, {cache}, {v_LBKSH.dtype}"
        return f"needs bfloat16 queries and a cache of bfloat16, int8 or float8_e4m3fn, got {got}"
    if (cache in quantised.DTYPES) != (k_scale_LBKS is not None and v_scale_LBKS is not None):
        return "needs scales of keys and values with an 8-bit cache, and only then"
    if head_dim not in (64, 128):
        return f"needs a head dimension of 64 or 128, got {head_dim}"
    aligned = _aligned(cache, head_dim)
    if capacity % aligned:
        return f"needs a cache capacity that is a multiple of {aligned}, got {capacity}"
    return None


def tile_for(problem: Problem, chunk_len: int | None) -> int:
    """Keys a tile: a power of two of about 1 MiB that divides a chunk's keys in this cache and fits it.

    Raises:
        NotImplementedError: there is none.
    """
    key_bytes = problem.kv_heads * problem.head_dim * jnp.dtype(problem.cache).itemsize
    smallest = _aligned(jnp.dtype(problem.cache), problem.head_dim)
    block_kv = 1 << max(_TILE_BYTES // key_bytes, smallest).bit_length() - 1
    while block_kv > smallest and (block_kv > problem.capacity or (chunk_len and chunk_len % block_kv)):
        block_kv //= 2
    if block_kv > problem.capacity or (chunk_len and chunk_len % block_kv):
        raise NotImplementedError(f"needs a chunk length that is a multiple of {smallest}, got {chunk_len}")
    return block_kv


def _aligned(cache: Any, head_dim: int) -> int:
    """What starts and ends of copies are multiples of: rows of a tile in memory, or lanes for the factors of 8-bit numbers."""
    return LANES if cache.itemsize == 1 else alignment(head_dim)
