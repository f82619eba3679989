"""Decode attention on NVIDIA Hopper GPUs: what the Mosaic GPU kernel serves, how a call is laid out for it, the merge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels import quantised
from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.decode_attention.hopper import Problem, Tiling, decode, shares
from qwen_jax.kernels.decode_attention.specs import tiling_for
from qwen_jax.kernels.hopper import LOG2E, why_not_hopper, why_not_shared
from qwen_jax.kernels.hopper_walk import ROWS
from qwen_jax.kernels.merge import merge
from qwen_jax.rope import Rotary, Stage, temperature


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
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.decode_attention.api.decode_attend`. K and V must be finite to the end of a key tile.

    Args:
        tiling: sizes of the kernel; None for the tuned ones.
        interpret: parameters of jax's GPU interpreter, to run without a GPU.

    Raises:
        NotImplementedError: not a Hopper GPU, or shapes and dtypes the kernel does not serve.
    """
    if not interpret and (reason := why_not_hopper()):
        raise NotImplementedError(reason)
    if reason := refusal(q_BNH, k_LBKSH, v_LBKSH, rotary, k_scale_LBKS, v_scale_LBKS):
        raise NotImplementedError(reason)
    B, N, H = q_BNH.shape
    K, S = k_LBKSH.shape[2:4]
    problem = Problem(
        3 if rotary.dca else 1,
        B,
        N,
        K,
        S,
        H,
        rotary.dca.original_max_position_embeddings if rotary.dca else 0,
        str(k_LBKSH.dtype),
        share.blocks if share else None,
    )
    tiling = tiling or tiling_for(problem, rotary.chunk_len)
    if rotary.chunk_len and rotary.chunk_len % tiling.block_kv:
        raise NotImplementedError(
            f"chunk length {rotary.chunk_len} is not a multiple of the key tile {tiling.block_kv}"
        )
    if reason := why_not_shared(share, tiling.block_kv):
        raise NotImplementedError(reason)
    held = share or EVERYTHING
    position_B, prompt_len_B = (jnp.asarray(x, jnp.int32) for x in (position_B, prompt_len_B))
    query_B = jnp.maximum(position_B, 0)
    warmth_B = temperature(prompt_len_B, problem.original)
    factor_B = scale_B.astype(jnp.float32) * LOG2E * warmth_B
    out, lse = decode(problem, tiling, q_BNH.dtype, interpret)(
        jnp.stack([jnp.int32(layer), jnp.int32(held.rank)]),
        jnp.stack([position_B, prompt_len_B, *map(held.below, rotary.stage_starts(query_B))], axis=1).reshape(
            -1
        ),
        1 / warmth_B,
        _rotations(q_BNH, query_B, factor_B, rotary, problem),
        k_LBKSH.reshape(-1, S, H),
        v_LBKSH.reshape(-1, S, H),
        *(x.astype(jnp.float32).reshape(-1, S) for x in (k_scale_LBKS, v_scale_LBKS) if x is not None),
    )
    P, G = shares(problem, tiling), problem.group
    out_BKPGH = out.reshape(B, K, P, problem.rows, H)[:, :, :, :G]
    lse_BKPG = lse.reshape(B, K, P, ROWS)[..., :G]
    merged_BKGH, merged_BKG = merge(out_BKPGH, lse_BKPG, axis=2)
    merged_BKGH = quantised.unmix(merged_BKGH) if problem.quantised else merged_BKGH
    return merged_BKGH.reshape(B, N, H).astype(q_BNH.dtype), merged_BKG.reshape(B, N)


def refusal(
    q_BNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    rotary: Rotary,
    k_scale_LBKS: jax.Array | None = None,
    v_scale_LBKS: jax.Array | None = None,
) -> str | None:
    """Why the kernel cannot serve these shapes and dtypes, or None."""
    K, capacity, head_dim = k_LBKSH.shape[2:]
    cache = k_LBKSH.dtype
    if (
        q_BNH.dtype != jnp.bfloat16
        or v_LBKSH.dtype != cache
        or cache not in (jnp.dtype(jnp.bfloat16), *quantised.DTYPES)
    ):
        got = f"{q_BNH.dtype}, {cache}, {v_LBKSH.dtype}"
        return f"needs bfloat16 queries and a cache of bfloat16, int8 or float8_e4m3fn, got {got}"
    if (cache in quantised.DTYPES) != (k_scale_LBKS is not None and v_scale_LBKS is not None):
        return "needs scales of keys and values with an 8-bit cache, and only then"
    if head_dim not in (64, 128):
        return f"needs a head dimension of 64 or 128, got {head_dim}"
    if q_BNH.shape[1] // K > ROWS:
        return f"needs at most {ROWS} query heads a KV head, got {q_BNH.shape[1] // K}"
    if capacity % 8:
        return f"needs a cache capacity that is a multiple of 8, got {capacity}"
    if rotary.chunk_len and rotary.chunk_len % 64:
        return f"needs a dual chunk length that is a multiple of 64, got {rotary.chunk_len}"
    return None


def _rotations(
    q_BNH: jax.Array, position_B: jax.Array, factor_B: jax.Array, rotary: Rotary, problem: Problem
) -> jax.Array:
    """The queries as each stage's keys lie in the cache, scaled, stages in key order, heads padded: [stages * B * K, 64, H]."""
    stages = (Stage.INTER, Stage.SUCC, Stage.INTRA) if rotary.dca else (Stage.INTRA,)
    q_B1NH = q_BNH.astype(jnp.float32)[:, None] * factor_B[:, None, None, None]
    q = jnp.stack([rotary.rotate_queries(q_B1NH, position_B[:, None], stage) for stage in stages])
    q = quantised.mix(q) if problem.quantised else q
    q = q.astype(q_BNH.dtype).reshape(-1, problem.group, problem.head_dim)
    return jnp.pad(q, ((0, 0), (0, ROWS - problem.group), (0, 0)))
