"""Prefill attention on TPUs: what the Mosaic TPU kernel serves, and how a call is laid out for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels.attention.backward import with_reference_backward
from qwen_jax.kernels.attention.tpu import Problem, Tiling, prefill
from qwen_jax.kernels.attention.tpu_specs import tiling_for
from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.tpu import LANES, LOG2E, alignment, as_it_lies, generation, target, why_not_tpu
from qwen_jax.rope import Rotary


def attend(
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    *,
    layer: jax.Array | int,
    q_start: jax.Array | int,
    kv_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    share: Share | None = None,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.attention.api.attend`. K and V must be finite up to the end of a key tile.

    Differentiable in q, k, v and scale without a share: the backward pass is the reference's.

    Args:
        tiling: sizes of the kernel; None for those of the TPU that is compiled for.
        interpret: parameters of jax's TPU interpreter, to run without a TPU.

    Raises:
        NotImplementedError: not a TPU, or shapes and dtypes the kernel does not serve.
    """
    if not interpret and (reason := why_not_tpu()):
        raise NotImplementedError(reason)
    if reason := refusal(q_BTNH, k_LBKSH, v_LBKSH):
        raise NotImplementedError(reason)
    blocks = share.blocks if share else None
    chunk_slots = rotary.chunk_len and rotary.chunk_len // (blocks.count if blocks else 1)
    tiling = tiling or tiling_for(generation(target()), k_LBKSH.shape[4], k_LBKSH.shape[3], chunk_slots)
    if chunk_slots and chunk_slots % tiling.block_kv:
        raise NotImplementedError(
            f"a chunk of {chunk_slots} keys is not a multiple of the key tile {tiling.block_kv}"
        )
    integers = (
        jnp.asarray(layer, jnp.int32),
        jnp.asarray(q_start, jnp.int32),
        jnp.asarray(kv_len_B, jnp.int32),
    )
    if share:
        return _forward((rotary, tiling, interpret), q_BTNH, k_LBKSH, v_LBKSH, scale_B, integers, share)
    return _attend((rotary, tiling, interpret), q_BTNH, k_LBKSH, v_LBKSH, scale_B, integers)


def refusal(q_BTNH: jax.Array, k_LBKSH: jax.Array, v_LBKSH: jax.Array) -> str | None:
    """Why the kernel cannot serve these shapes and dtypes, or None."""
    head_dim, capacity = k_LBKSH.shape[4], k_LBKSH.shape[3]
    if {q_BTNH.dtype, k_LBKSH.dtype, v_LBKSH.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return (
            f"needs bfloat16 queries, keys and values, got {q_BTNH.dtype}, {k_LBKSH.dtype}, {v_LBKSH.dtype}"
        )
    if head_dim not in (64, 128):
        return f"needs a head dimension of 64 or 128, got {head_dim}"
    if capacity % alignment(head_dim):
        return f"needs a cache capacity that is a multiple of {alignment(head_dim)}, got {capacity}"
    return None


def problem_of(q_BTNH: jax.Array, k_LBKSH: jax.Array, rotary: Rotary, tiling: Tiling) -> Problem:
    """The kernel's problem of a call. Few tokens: as many heads of a KV head as a query tile holds share its keys."""
    B, T, N, H = q_BTNH.shape
    _, _, K, S, _ = k_LBKSH.shape
    G = N // K
    tokens = min(max(tiling.block_q // LANES, 1) * LANES, -(-T // LANES) * LANES)
    together = max(n for n in range(1, G + 1) if G % n == 0 and (n == 1 or n * tokens <= tiling.block_q))
    return Problem(len(rotary.stages), B, N // together, together, -(-T // tokens), tokens, K, S, H)


def _forward(
    static: tuple[Rotary, Tiling, Any],
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    scale_B: jax.Array,
    integers: tuple[jax.Array, jax.Array, jax.Array],
    share: Share = EVERYTHING,
) -> tuple[jax.Array, jax.Array]:
    rotary, tiling, interpret = static
    layer, q_start, kv_len_B = integers
    (B, T, N, H), p = q_BTNH.shape, problem_of(q_BTNH, k_LBKSH, rotary, tiling)
    p = p if share is EVERYTHING else dataclasses.replace(p, blocks=share.blocks)
    stages = (share.below(x) // tiling.block_kv for x in rotary.stage_starts(q_start))
    where = jnp.stack([layer, q_start, *stages, jnp.asarray(share.rank, jnp.int32)])
    walks_BC2 = _walks(q_start, kv_len_B, p, tiling, share)
    tile = (p.tiles, p.tokens)
    q_PBTNH = rotations(q_BTNH, q_start, scale_B.astype(jnp.float32) * LOG2E, rotary)
    q_PBTNH = jnp.pad(q_PBTNH, ((0, 0), (0, 0), (0, p.tiles * p.tokens - T), (0, 0), (0, 0)))
    q_PBXRH = jnp.einsum("PBCTXGH->PBXCGTH", q_PBTNH.reshape(-1, B, *tile, p.bundles, p.together, H)).reshape(
        p.versions, B, p.bundles, -1, H
    )
    out_BXRH, lse_BX1R = prefill(p, tiling, q_BTNH.dtype, interpret)(
        where, kv_len_B, walks_BC2.reshape(-1), q_PBXRH, as_it_lies(k_LBKSH), as_it_lies(v_LBKSH)
    )
    heads = (B, p.bundles, p.tiles, p.together, p.tokens)
    out = jnp.einsum("BXCGTH->BCTXGH", out_BXRH.reshape(*heads, H)).reshape(B, -1, N, H)
    lse = jnp.einsum("BXCGT->BCTXG", lse_BX1R.reshape(heads)).reshape(B, -1, N)
    return out[:, :T], lse[:, :T]


_attend = with_reference_backward(_forward)


def _walks(
    q_start: jax.Array, kv_len_B: jax.Array, problem: Problem, tiling: Tiling, share: Share
) -> jax.Array:
    """int32[B, tiles, 2]: key tiles that a query tile walks, and how many of them its first query sees whole."""
    first_C = q_start + jnp.arange(problem.tiles, dtype=jnp.int32) * problem.tokens

    def slots(end_C: jax.Array) -> jax.Array:
        return jnp.minimum(share.below(jnp.minimum(end_C, kv_len_B[:, None])), problem.capacity)

    walked_BC = -(-slots(first_C + problem.tokens) // tiling.block_kv)
    return jnp.stack([walked_BC, slots(first_C + 1) // tiling.block_kv], axis=-1)


def rotations(q_BTNH: jax.Array, q_start: jax.Array, factor_B: jax.Array, rotary: Rotary) -> jax.Array:
    """The queries as each stage's keys see them, scaled, rounded once, stages in key order: [P, B, T, N, H].

    Args:
        factor_B: float32[B], on scores, for an exponential of base 2.
    """
    i_T = q_start + jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)
    return rotary.query_stages(q_BTNH, i_T, scale_B=factor_B)
