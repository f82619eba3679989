"""Prefill attention on NVIDIA Hopper GPUs: what the Mosaic GPU kernel serves, and how a call is laid out for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.kernels.attention.backward import with_reference_backward
from qwen_jax.kernels.attention.hopper import Problem, Tiling, prefill
from qwen_jax.kernels.attention.specs import tiling_for
from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.hopper import KEY_DTYPES, LOG2E, why_not_hopper, why_not_shared
from qwen_jax.rope import Rotary

ROW_TILE = 8  # TMA with swizzled tiles moves rows in eights


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

    Without a share it is differentiable in q, k, v and scale: the backward pass is the reference's.

    Args:
        tiling: sizes of the kernel; None for the tuned ones.
        interpret: parameters of jax's GPU interpreter, to run without a GPU.

    Raises:
        NotImplementedError: not a Hopper GPU, or shapes and dtypes the kernel does not serve.
    """
    if not interpret and (reason := why_not_hopper()):
        raise NotImplementedError(reason)
    if reason := refusal(q_BTNH, k_LBKSH, v_LBKSH, rotary):
        raise NotImplementedError(reason)
    problem = problem_of(q_BTNH, k_LBKSH, rotary)
    tiling = tiling or tiling_for(problem, rotary.chunk_len)
    if rotary.chunk_len and rotary.chunk_len % tiling.block_kv:
        raise NotImplementedError(
            f"chunk length {rotary.chunk_len} is not a multiple of the key tile {tiling.block_kv}"
        )
    if reason := why_not_shared(share, tiling.block_kv):
        raise NotImplementedError(reason)
    integers = (
        jnp.asarray(layer, jnp.int32),
        jnp.asarray(q_start, jnp.int32),
        jnp.asarray(kv_len_B, jnp.int32),
    )
    static = rotary, tiling, interpret
    if share is None:
        return _differentiable(static, q_BTNH, k_LBKSH, v_LBKSH, scale_B, integers)
    return _attend(static, q_BTNH, k_LBKSH, v_LBKSH, scale_B, integers, share)


def refusal(q_BTNH: jax.Array, k_LBKSH: jax.Array, v_LBKSH: jax.Array, rotary: Rotary) -> str | None:
    """Why the kernel cannot serve these shapes and dtypes, or None."""
    head_dim, capacity = k_LBKSH.shape[4], k_LBKSH.shape[3]
    if {q_BTNH.dtype, v_LBKSH.dtype} != {jnp.dtype(jnp.bfloat16)} or k_LBKSH.dtype not in KEY_DTYPES:
        got = f"{q_BTNH.dtype}, {k_LBKSH.dtype}, {v_LBKSH.dtype}"
        return f"needs bfloat16 queries and values, and keys of bfloat16 or float16, got {got}"
    if head_dim not in (64, 128):
        return f"needs a head dimension of 64 or 128, got {head_dim}"
    if capacity % ROW_TILE:
        return f"needs a cache capacity that is a multiple of {ROW_TILE}, got {capacity}"
    if rotary.chunk_len and rotary.chunk_len % 64:
        return f"needs a dual chunk length that is a multiple of 64, got {rotary.chunk_len}"
    return None


def problem_of(q_BTNH: jax.Array, k_LBKSH: jax.Array, rotary: Rotary, share: Share | None = None) -> Problem:
    """The kernel's problem of a call; queries rounded up to what TMA can move."""
    B, T, N, H = q_BTNH.shape
    _, _, K, S, _ = k_LBKSH.shape
    versions, rows, blocks = len(rotary.stages), -(-T // ROW_TILE) * ROW_TILE, share.blocks if share else None
    return Problem(versions, B, rows, N, K, S, H, blocks)


def _attend(
    static: tuple[Rotary, Tiling, Any],
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    scale_B: jax.Array,
    integers: tuple[jax.Array, jax.Array, jax.Array],
    share: Share | None = None,
) -> tuple[jax.Array, jax.Array]:
    rotary, tiling, interpret = static
    layer, q_start, kv_len_B = integers
    problem = problem_of(q_BTNH, k_LBKSH, rotary, share)
    T, S, H = q_BTNH.shape[1], problem.capacity, problem.head_dim
    kernel = prefill(problem, tiling, (k_LBKSH.dtype, v_LBKSH.dtype), interpret)
    held = share or EVERYTHING
    succ, intra = (held.below(start) for start in rotary.stage_starts(q_start))
    out, lse_BNT = kernel(
        jnp.stack([layer, q_start, succ, intra, jnp.int32(held.rank)]),
        kv_len_B,
        rotations(
            q_BTNH, q_start, scale_B.astype(jnp.float32) * LOG2E, rotary, problem.queries, k_LBKSH.dtype
        ),
        k_LBKSH.reshape(-1, S, H),
        v_LBKSH.reshape(-1, S, H),
    )
    return out[:, :T], jnp.swapaxes(lse_BNT[..., :T], 1, 2)


_differentiable = with_reference_backward(_attend)


def rotations(
    q_BTNH: jax.Array,
    q_start: jax.Array,
    factor_B: jax.Array | None,
    rotary: Rotary,
    queries: int,
    dtype: DTypeLike,
) -> jax.Array:
    """The queries as each stage's keys see them, times factor_B, rounded once, to `dtype`: [stages * B, queries, N, H], in key
    order."""
    _, T, N, H = q_BTNH.shape
    i_T = q_start + jnp.arange(T, dtype=jnp.int32)
    q = rotary.query_stages(q_BTNH, i_T, scale_B=factor_B, dtype=dtype).reshape(-1, T, N, H)
    return jnp.pad(q, ((0, 0), (0, queries - T), (0, 0), (0, 0)))
