"""Sparse prefill attention on NVIDIA Hopper GPUs: what the Mosaic GPU kernel serves, and how a call is laid out for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.attention.mosaic_gpu import ROW_TILE, refusal, rotations
from qwen_jax.kernels.hopper import LOG2E, why_not_hopper
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
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.sparse_attention.api.attend_lines`. K and V must be finite up to the end of a key tile.

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
    call = _Call(rotary, most_columns, tiling or Tiling(), interpret)
    layer, q_start, kv_len_B = (jnp.asarray(x, jnp.int32) for x in (layer, q_start, kv_len_B))
    end_B = jnp.minimum(kv_len_B, q_start + q_BTNH.shape[1])
    return lax.cond(
        q_start % BAND == 0, call.from_a_tile_on, call.from_anywhere_on,
        q_BTNH, k_LBKSH, v_LBKSH, columns_BNS, bands_BNM, layer, q_start, end_B, scale_B,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static arguments of a call."""

    rotary: Rotary
    most_columns: int
    tiling: Tiling
    interpret: Any

    def from_anywhere_on(
        self, q_BTNH: jax.Array, k: jax.Array, v: jax.Array, columns: jax.Array, bands: jax.Array,
        layer: jax.Array, q_start: jax.Array, end_B: jax.Array, scale_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """Moves the queries to where they stand in the tile that the first of them lies in, and the results back."""
        T, into = q_BTNH.shape[1], q_start % BAND
        room = jnp.pad(q_BTNH, ((0, 0), (BAND, BAND), (0, 0), (0, 0)))
        q_BTNH = lax.dynamic_slice_in_dim(room, BAND - into, T + BAND, 1)
        found = self.from_a_tile_on(q_BTNH, k, v, columns, bands, layer, q_start - into, end_B, scale_B)
        return tuple(lax.dynamic_slice_in_dim(x, into, T, 1) for x in found)  # type: ignore[return-value]

    def from_a_tile_on(
        self, q_BTNH: jax.Array, k_LBKSH: jax.Array, v_LBKSH: jax.Array, columns_BNS: jax.Array, bands_BNM: jax.Array,
        layer: jax.Array, q_start: jax.Array, end_B: jax.Array, scale_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """q_start is a multiple of BAND; queries and keys of a row are real up to end_B."""
        B, T, N, H = q_BTNH.shape
        K, S = k_LBKSH.shape[2:4]
        walk, k_columns, v_columns = lists(
            k_LBKSH, v_LBKSH, columns_BNS=columns_BNS, bands_BNM=bands_BNM, most_columns=self.most_columns,
            layer=layer, q_start=q_start, kv_len_B=end_B, rotary=self.rotary, queries=T,
        )  # fmt: skip
        versions, slots = len(self.rotary.stages), walk.position.shape[1]
        problem = Problem(versions, B, -(-T // ROW_TILE) * ROW_TILE, N, K, S, H, slots)
        out, lse_BNT = sparse_prefill(problem, self.tiling, q_BTNH.dtype, self.interpret)(
            jnp.stack([layer, q_start]),
            walk.items,
            walk.near,
            walk.in_band,
            walk.column_tile,
            rotations(q_BTNH, q_start, scale_B.astype(jnp.float32) * LOG2E, self.rotary, problem.queries),
            k_LBKSH.reshape(-1, S, H),
            v_LBKSH.reshape(-1, S, H),
            k_columns,
            v_columns,
        )
        return out[:, :T], jnp.swapaxes(lse_BNT[..., :T], 1, 2)


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
) -> tuple[Plan, jax.Array, jax.Array]:
    """What the kernel walks, and the keys and values of the columns, [B * N, slots, H]; T queries, else as `attend_lines`."""
    B, N, S = columns_BNS.shape
    walk = plan(
        columns_BNS, bands_BNM, most_columns=min(most_columns, S), q_start=q_start, query_tiles=-(-queries // BAND),
        kv_len_B=kv_len_B, stage_starts=rotary.stage_starts(q_start), dca=rotary.dca is not None,
    )  # fmt: skip
    row_X = jnp.repeat(jnp.arange(B), N)[:, None]
    kv_head_X = jnp.tile(jnp.arange(N) // (N // k_LBKSH.shape[2]), B)[:, None]
    return walk, *(x[layer, row_X, kv_head_X, walk.position] for x in (k_LBKSH, v_LBKSH))
