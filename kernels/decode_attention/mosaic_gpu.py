"""Decode attention on NVIDIA Hopper GPUs: what the Mosaic GPU kernel serves, how a call is laid out for it, the merge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels import quantised
from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.decode_attention import hopper, hopper_quantised
from qwen_jax.kernels.decode_attention.hopper_workers import HEADS, Workers, arranged
from qwen_jax.kernels.decode_attention.specs import tiling_for
from qwen_jax.kernels.decode_attention.split import Problem, Tiling, shares
from qwen_jax.kernels.hopper import KEY_DTYPES, LOG2E, why_not_hopper, why_not_shared
from qwen_jax.kernels.hopper_walk import ROWS
from qwen_jax.kernels.merge import merge
from qwen_jax.kernels.mixing import unmix
from qwen_jax.rope import Rotary, temperature


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
        str(v_LBKSH.dtype),
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
    arguments = (
        jnp.stack([jnp.int32(layer), jnp.int32(held.rank)]),
        jnp.stack([position_B, prompt_len_B, *map(held.below, rotary.stage_starts(query_B))], 1).reshape(-1),
        1 / warmth_B,
    )
    # Of an 8-bit cache they are rounded once a power of two has made them fit, in `_decode_quantised`.
    met = jnp.dtype(jnp.float32) if problem.quantised else k_LBKSH.dtype
    q_VB1NH = rotary.query_stages(q_BNH[:, None], query_B[:, None], scale_B=factor_B, dtype=met)
    q_VBKGH = q_VB1NH.reshape(-1, B, K, problem.group, H)
    caches = [x.reshape(-1, S, H) for x in (k_LBKSH, v_LBKSH)]
    scales = [x.astype(jnp.float32).reshape(-1, S) for x in (k_scale_LBKS, v_scale_LBKS) if x is not None]
    run = _decode_quantised if problem.quantised else _decode
    out_BKPGH, lse_BKPG = run(problem, tiling, arguments, q_VBKGH, [*caches, *scales], interpret)
    merged_BKGH, merged_BKG = merge(out_BKPGH, lse_BKPG, axis=2)
    merged_BKGH = unmix(merged_BKGH) if problem.quantised else merged_BKGH
    return merged_BKGH.reshape(B, N, H).astype(q_BNH.dtype), merged_BKG.reshape(B, N)


def _decode(
    problem: Problem,
    tiling: Tiling,
    arguments: tuple[jax.Array, ...],
    q_VBKGH: jax.Array,
    caches: list[jax.Array],
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """The parts of every share P of a row and KV head: (out [B, K, P, G, H], lse [B, K, P, G])."""
    B, K, G, H = q_VBKGH.shape[1:]
    q = jnp.pad(q_VBKGH.reshape(-1, G, H), ((0, 0), (0, ROWS - G), (0, 0)))
    out, lse = hopper.decode(problem, tiling, (q.dtype, caches[1].dtype), interpret)(*arguments, q, *caches)
    P = shares(problem, tiling)
    return out.reshape(B, K, P, -1, H)[:, :, :, :G], lse.reshape(B, K, P, ROWS)[..., :G]


def _decode_quantised(
    problem: Problem,
    tiling: Tiling,
    arguments: tuple[jax.Array, ...],
    q_VBKGH: jax.Array,
    caches: list[jax.Array],
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """As `_decode`, of mixed values."""
    B, K, G, H = q_VBKGH.shape[1:]
    workers = Workers(H, caches[0].dtype, bool(interpret))
    # Powers of two that bring the largest entry of a KV head's queries to 2^10, well inside float16.
    largest_BK = jnp.maximum(jnp.abs(q_VBKGH).max((0, 3, 4)), 2.0**-60)
    unit_BK = jnp.ldexp(jnp.float32(1), jnp.frexp(largest_BK)[1] - 11)
    q = (q_VBKGH / unit_BK[..., None, None]).reshape(-1, G, H)
    q = arranged(jnp.pad(q, ((0, 0), (0, HEADS - G), (0, 0))), bool(interpret))
    unit = unit_BK.reshape(-1) * workers.unit
    out, lse = hopper_quantised.decode(problem, tiling, interpret)(*arguments, unit, q, *caches)
    P = shares(problem, tiling)
    out_BKPGH = out.reshape(B, K, P, -1, 8, HEADS).transpose(0, 1, 2, 5, 4, 3).reshape(B, K, P, HEADS, H)
    return out_BKPGH[:, :, :, :G] * workers.unit, lse.reshape(B, K, P, -1)[..., :G]


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
    cache = v_LBKSH.dtype
    keys = KEY_DTYPES if cache == jnp.bfloat16 else (cache,)
    if (
        q_BNH.dtype != jnp.bfloat16
        or k_LBKSH.dtype not in keys
        or cache not in (jnp.dtype(jnp.bfloat16), *quantised.DTYPES)
    ):
        got = f"{q_BNH.dtype}, {k_LBKSH.dtype}, {cache}"
        return f"needs bfloat16 queries and a cache of bfloat16 (keys of float16 too), int8 or float8_e4m3fn, got {got}"
    if (cache in quantised.DTYPES) != (k_scale_LBKS is not None and v_scale_LBKS is not None):
        return "needs scales of keys and values with an 8-bit cache, and only then"
    if head_dim not in (64, 128):
        return f"needs a head dimension of 64 or 128, got {head_dim}"
    most = HEADS if cache in quantised.DTYPES else ROWS
    if q_BNH.shape[1] // K > most:
        return f"needs at most {most} query heads a KV head with a {cache} cache, got {q_BNH.shape[1] // K}"
    if capacity % 8:
        return f"needs a cache capacity that is a multiple of 8, got {capacity}"
    if rotary.chunk_len and rotary.chunk_len % 64:
        return f"needs a dual chunk length that is a multiple of 64, got {rotary.chunk_len}"
    return None
