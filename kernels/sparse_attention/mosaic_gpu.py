"""Sparse prefill attention on NVIDIA Hopper GPUs: what the Mosaic GPU kernel serves, and how a call is laid out for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention.mosaic_gpu import ROW_TILE, refusal, rotations
from qwen_jax.kernels.blocks import Share
from qwen_jax.kernels.hopper import LOG2E, why_not_hopper, why_not_shared
from qwen_jax.kernels.sparse_attention.bands import BAND
from qwen_jax.kernels.sparse_attention.hopper import Problem, Tiling, sparse_prefill
from qwen_jax.kernels.sparse_attention.plan import Plan, plan
from qwen_jax.rope import Rotary


def attend_lines(
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    *,
    columns_BNS: jax.Array,
    bands_BNM: jax.Array,
    most_columns: int,
    layer: jax.Array | int,
    q_start: jax.Array | int,
    kv_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    band: int = BAND,
    share: Share | None = None,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.sparse_attention.api.attend_lines`. K and V must be finite up to the end of a key tile, and in the first.

    Args:
        tiling: sizes of the kernel; None for the usual ones.
        interpret: parameters of jax's GPU interpreter, to run without a GPU.

    Raises:
        NotImplementedError: not a Hopper GPU, or shapes and dtypes the kernel does not serve.
    """
    if not interpret and (reason := why_not_hopper()):
        raise NotImplementedError(reason)
    if reason := refusal(q_BTNH, k_LBKSH, v_LBKSH, rotary):
        raise NotImplementedError(reason)
    if band != BAND:
        raise NotImplementedError(f"needs bands of {BAND}, got {band}")
    if rotary.chunk_len and rotary.chunk_len % BAND:
        raise NotImplementedError(f"chunk length {rotary.chunk_len} is not a multiple of the band, {BAND}")
    if reason := why_not_shared(share, BAND):
        raise NotImplementedError(reason)
    layer, q_start, kv_len_B = (jnp.asarray(x, jnp.int32) for x in (layer, q_start, kv_len_B))
    B, T, N, H = q_BTNH.shape
    K, S = k_LBKSH.shape[2:4]
    walk, k_columns, v_columns = lists(
        k_LBKSH, v_LBKSH, columns_BNS=columns_BNS, bands_BNM=bands_BNM, most_columns=most_columns, layer=layer,
        q_start=q_start, kv_len_B=jnp.minimum(kv_len_B, q_start + T), rotary=rotary, queries=T, share=share,
    )  # fmt: skip
    # The kernel's queries start with a tile: they are moved to where they stand in it, and the results back, as part of the
    # rotation before and of whatever reads the results.
    into, rows = q_start % BAND, -(-(T + BAND) // ROW_TILE) * ROW_TILE
    room = jnp.pad(q_BTNH, ((0, 0), (BAND, BAND), (0, 0), (0, 0)))
    moved = lax.dynamic_slice_in_dim(room, BAND - into, T + BAND, 1)
    problem = Problem(
        len(rotary.stages), B, rows, N, K, S, H, walk.position.shape[1], share.blocks if share else None
    )
    out, lse_BNT = sparse_prefill(problem, tiling or Tiling(), (k_LBKSH.dtype, v_LBKSH.dtype), interpret)(
        jnp.stack([layer, q_start - into]),
        scale_B.astype(jnp.float32) * LOG2E,
        walk.items,
        walk.near,
        walk.in_band,
        walk.column_tile,
        rotations(moved, q_start - into, None, rotary, rows, k_LBKSH.dtype),
        k_LBKSH.reshape(-1, S, H),
        v_LBKSH.reshape(-1, S, H),
        k_columns,
        v_columns,
    )
    out, lse = (lax.dynamic_slice_in_dim(x, into, T, 1) for x in (out, jnp.swapaxes(lse_BNT, 1, 2)))
    return out, lse


def lists(
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    *,
    columns_BNS: jax.Array,
    bands_BNM: jax.Array,
    most_columns: int,
    layer: jax.Array,
    q_start: jax.Array,
    kv_len_B: jax.Array,
    rotary: Rotary,
    queries: int,
    share: Share | None = None,
) -> tuple[Plan, jax.Array, jax.Array]:
    """What the kernel walks, and the keys and values of the columns, [B * N, slots, H], for as many queries from
    q_start on, wherever that is in its tile; the rest as `attend_lines`."""
    B, N, S = columns_BNS.shape
    walk = plan(
        columns_BNS, bands_BNM, most_columns=min(most_columns, S), q_start=q_start, query_tiles=-(-(queries + BAND) // BAND),
        kv_len_B=kv_len_B, stage_starts=rotary.stage_starts(q_start), dca=rotary.dca is not None,
        share=share,
    )  # fmt: skip
    row_X = jnp.repeat(jnp.arange(B), N)[:, None]
    kv_head_X = jnp.tile(jnp.arange(N) // (N // k_LBKSH.shape[2]), B)[:, None]
    return walk, *(x[layer, row_X, kv_head_X, walk.position] for x in (k_LBKSH, v_LBKSH))
