"""Sparse prefill attention on TPUs: what the Mosaic TPU kernel serves, and how a call is laid out for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention import mosaic_tpu as dense
from qwen_jax.kernels.sparse_attention.bands import BAND
from qwen_jax.kernels.sparse_attention.lists import column_slots
from qwen_jax.kernels.sparse_attention.tpu import Problem, Tiling, sparse_prefill
from qwen_jax.kernels.sparse_attention.tpu_columns import compact
from qwen_jax.kernels.sparse_attention.tpu_plan import plan
from qwen_jax.kernels.tpu import LANES, LOG2E, as_it_lies, flat, generation, target, why_not_tpu
from qwen_jax.rope import Rotary

_WIDE = {"v6e", "tpu7x"}  # their matrix units are 256 wide


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
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.sparse_attention.api.attend_lines`. K and V must be finite up to the end of a query block.

    Args:
        tiling: sizes of the kernel; None for the default ones.
        interpret: parameters of jax's TPU interpreter, to run without a TPU.

    Raises:
        NotImplementedError: not a TPU, or shapes and dtypes the kernel does not serve.
    """
    if not interpret and (reason := why_not_tpu()):
        raise NotImplementedError(reason)
    capacity, head_dim = k_LBKSH.shape[3:]
    tiling = tiling or tiling_for(generation(target()), head_dim)
    if reason := dense.refusal(q_BTNH, k_LBKSH, v_LBKSH):
        raise NotImplementedError(reason)
    if band != BAND:
        raise NotImplementedError(f"needs bands of {BAND}, got {band}")
    if rotary.chunk_len and rotary.chunk_len % BAND:
        raise NotImplementedError(f"chunk length {rotary.chunk_len} is not a multiple of the band, {BAND}")
    if capacity < (reach := tiling.reach(tiling.runs[0])):
        raise NotImplementedError(f"needs a cache of at least {reach} positions, got {capacity}")
    (B, T, N, H), (K, S) = q_BTNH.shape, k_LBKSH.shape[2:4]
    layer, q_start, kv_len_B = (jnp.asarray(x, jnp.int32) for x in (layer, q_start, kv_len_B))
    end_B = jnp.minimum(kv_len_B, q_start + T)
    most_columns, dca = min(most_columns, S), rotary.dca is not None
    # The kernel's queries start with a tile: they are moved to where they stand in it, and the results back. The query block
    # more that they may need costs nothing where it holds none.
    into, rows = q_start % BAND, tiling.tiles * BAND
    blocks = -(-(T + BAND) // rows)
    room = jnp.pad(q_BTNH, ((0, 0), (BAND, blocks * rows - T), (0, 0), (0, 0)))
    moved = lax.dynamic_slice_in_dim(room, BAND - into, blocks * rows, 1)
    q_PBTNH = dense.rotations(moved, q_start - into, scale_B.astype(jnp.float32) * LOG2E, rotary)
    stage_starts = rotary.stage_starts(q_start)
    walk = plan(
        columns_BNS, bands_BNM, most_columns=most_columns, q_start=q_start, blocks=blocks, tiles=tiling.tiles,
        runs=tiling.runs, kv_len_B=end_B, stage_starts=stage_starts, dca=dca, align=tiling.columns,
    )  # fmt: skip
    slots = column_slots(most_columns, dca, tiling.columns)
    problem = Problem(len(rotary.stages), B, N, K, blocks, S, H, slots)
    k, v = as_it_lies(k_LBKSH), as_it_lies(v_LBKSH)
    if flat(H):
        columns = compact(B, N, slots, tiling.columns, interpret)(
            layer[None], walk.column_tiles, walk.position[:, None], k, v
        )
    else:
        pair = jnp.repeat(jnp.arange(B), N)[:, None], jnp.tile(jnp.arange(N) // (N // K), B)[:, None]
        columns = k[layer, *pair, walk.position], v[layer, *pair, walk.position]
    out_BNTH, lse_BN1T = sparse_prefill(problem, tiling, q_BTNH.dtype, interpret)(
        jnp.stack([layer, *(x // BAND for x in (q_start, *stage_starts))]),
        end_B,
        walk.counts,
        walk.near,
        jnp.swapaxes(q_PBTNH, 2, 3),
        k,
        v,
        *columns,
        jnp.swapaxes(walk.left_out, 1, 2) if flat(H) else walk.left_out,
    )
    found = jnp.swapaxes(out_BNTH, 1, 2), jnp.swapaxes(lse_BN1T[:, :, 0], 1, 2)
    out, lse = (lax.dynamic_slice_in_dim(x, into, T, 1) for x in found)
    return out, lse


def tiling_for(generation: str | None, head_dim: int) -> Tiling:
    """The default sizes on a generation of TPUs (docs/tpu.md)."""
    return Tiling(wide=head_dim == LANES and generation in _WIDE)
