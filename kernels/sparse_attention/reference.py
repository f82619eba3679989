"""Attention over chosen lines in plain XLA: work is proportional to the keys computed, not to the keys there are.

Heads run one after another, for each chose its own lines. A head's columns are the same for every query, so their keys and
values are gathered into one array, in key order, and read a batch at a time. Its diagonals become aligned key tiles: a
query tile computes every key tile that a chosen diagonal touches, whole. Keys of such a tile that are columns are masked: they
have counted already. `computed_set` states which keys a query tile thus computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.products import einsum
from qwen_jax.rope import Rotary

QUERY_TILE = 128
KEY_TILE = 64
BATCH = 256  # keys a step; several tiles make one matrix product


class _Batch(NamedTuple):
    """Keys of one step: at positions j_S, of which `counts_S` count for the queries that may see them."""

    k_SH: jax.Array
    v_SH: jax.Array
    j_S: jax.Array
    counts_S: jax.Array


class _Softmax(NamedTuple):
    """The running softmax of a query tile: sum of weighted values [T, H], largest score [T], sum of weights [T]."""

    out: jax.Array
    peak: jax.Array
    total: jax.Array


def attend_lines(
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    *,
    columns_BNS: jax.Array,
    diagonals_BNS: jax.Array,
    most_columns: int,
    layer: jax.Array | int,
    q_start: jax.Array | int,
    kv_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.sparse_attention.api.attend_lines`; takes any s, T and device. Computes `computed_set`."""
    B, T, N, H = q_BTNH.shape
    K, S = k_LBKSH.shape[2:4]
    layer, q_start = jnp.int32(layer), jnp.int32(q_start)
    kv_len_B = jnp.asarray(kv_len_B, jnp.int32)
    tile = min(QUERY_TILE, T)
    C = -(-T // tile)
    i_T = q_start + jnp.arange(T, dtype=jnp.int32)
    q_PBTNH = jnp.stack([rotary.rotate_queries(q_BTNH, i_T, stage) for stage in rotary.stages])
    q_PBTNH = jnp.pad(q_PBTNH, ((0, 0), (0, 0), (0, C * tile - T), (0, 0), (0, 0)))
    q_XCPTH = jnp.einsum("PBCTNH->BNCPTH", q_PBTNH.reshape(-1, B, C, tile, N, H)).reshape(
        B * N, C, -1, tile, H
    )

    def one_head(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, q_CPTH, columns_S, diagonals_S = xs
        b, kv_head = x // N, x % N // (N // K)
        end = jnp.minimum(kv_len_B[b], S)
        head = _Head.of(
            k_LBKSH, v_LBKSH, (layer, b, kv_head), columns_S, diagonals_S, min(most_columns, S), end
        )

        def one_tile(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            c, q_PTH = xs
            return head.attend(q_PTH, q_start + c * tile, rotary, scale_B[b])

        return lax.map(one_tile, (jnp.arange(C, dtype=jnp.int32), q_CPTH))

    heads = jnp.arange(B * N, dtype=jnp.int32)
    lines = columns_BNS.reshape(B * N, S), diagonals_BNS.reshape(B * N, S)
    out_XCTH, lse_XCT = lax.map(one_head, (heads, q_XCPTH, *lines))
    out = jnp.einsum("BNTH->BTNH", out_XCTH.reshape(B, N, C * tile, H))
    lse = jnp.einsum("BNT->BTN", lse_XCT.reshape(B, N, C * tile))
    return out[:, :T].astype(q_BTNH.dtype), lse[:, :T]


_Add = Callable[[_Batch, _Softmax], _Softmax]


class _Head(NamedTuple):
    """What all query tiles of one head share.

    Attributes:
        k_LBKSH, v_LBKSH, where: the cache, and the (layer, row, KV head) to read.
        end: keys there are.
        column_S: bool, the chosen columns among them.
        before_S: number of chosen diagonals nearer than each distance 0 .. S.
        j_C, k_CH, v_CH: positions, keys and values of the columns in key order; S and anything past the last.
    """

    k_LBKSH: jax.Array
    v_LBKSH: jax.Array
    where: tuple[jax.Array, jax.Array, jax.Array]
    end: jax.Array
    column_S: jax.Array
    before_S: jax.Array
    j_C: jax.Array
    k_CH: jax.Array
    v_CH: jax.Array

    @classmethod
    def of(
        cls,
        k_LBKSH: jax.Array,
        v_LBKSH: jax.Array,
        where: tuple[jax.Array, jax.Array, jax.Array],
        columns_S: jax.Array,
        diagonals_S: jax.Array,
        most_columns: int,
        end: jax.Array,
    ) -> _Head:
        S = k_LBKSH.shape[3]
        column_S = columns_S & (jnp.arange(S) < end)
        # One batch more than there can be columns: a batch read from any place stays inside.
        (j_C,) = jnp.nonzero(column_S, size=most_columns + BATCH, fill_value=S)
        k_CH, v_CH = (x[*where].at[j_C].get(mode="clip") for x in (k_LBKSH, v_LBKSH))
        before_S = jnp.pad(jnp.cumsum(diagonals_S, dtype=jnp.int32), (1, 0))
        return cls(k_LBKSH, v_LBKSH, where, end, column_S, before_S, j_C.astype(jnp.int32), k_CH, v_CH)

    def attend(
        self, q_PTH: jax.Array, start: jax.Array, rotary: Rotary, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """One query tile from position `start` on, rotated for every stage P: (out float32[T, H], lse float32[T])."""
        _, T, H = q_PTH.shape
        i_T = start + jnp.arange(T, dtype=jnp.int32)
        last = jnp.minimum(start + T, self.end)  # one past the last key that any query sees
        tiles = self._tiles(start, last)
        state = _Softmax(jnp.zeros((T, H)), jnp.full(T, -jnp.inf), jnp.zeros(T))
        for p, (lo, hi) in enumerate(rotary.stage_ranges(start, last).values()):

            def add(
                batch: _Batch, state: _Softmax, p: int = p, lo: jax.Array = lo, hi: jax.Array = hi
            ) -> _Softmax:
                inside_S = batch.counts_S & (batch.j_S >= lo) & (batch.j_S < hi)
                return _add(q_PTH[p], batch, inside_S & (batch.j_S <= i_T[:, None]), scale, state)

            state = self._walk_columns(add, lo, hi, state)
            state = self._walk_tiles(add, tiles, lo, hi, state)
        empty = state.total == 0
        total = jnp.where(empty, 1.0, state.total)
        return state.out / total[:, None], jnp.where(empty, -jnp.inf, state.peak + jnp.log(total))

    def _tiles(self, start: jax.Array, last: jax.Array) -> jax.Array:
        """The key tiles that a chosen diagonal touches for queries [start, last), ascending, then M."""
        S = len(self.column_S)
        width = min(KEY_TILE, S)
        first_M = jnp.arange(-(-S // width), dtype=jnp.int32) * width
        nearest, farthest = start - first_M - (width - 1), last - 1 - first_M
        touched = self.before_S[jnp.clip(farthest + 1, 0, S)] > self.before_S[jnp.clip(nearest, 0, S)]
        touched &= (first_M < last) & (start < last)
        return jnp.nonzero(touched, size=len(first_M), fill_value=len(first_M))[0].astype(jnp.int32)

    def _walk_columns(self, add: _Add, lo: jax.Array, hi: jax.Array, state: _Softmax) -> _Softmax:
        first, stop = (self.j_C < lo).sum(), (self.j_C < hi).sum()

        def visit(n: jax.Array, state: _Softmax) -> _Softmax:
            at = first + n * BATCH
            j_S, k_SH, v_SH = (
                lax.dynamic_slice_in_dim(x, at, BATCH) for x in (self.j_C, self.k_CH, self.v_CH)
            )
            return add(_Batch(k_SH, v_SH, j_S, j_S < hi), state)

        return lax.fori_loop(0, -(-jnp.maximum(stop - first, 0) // BATCH), visit, state)

    def _walk_tiles(
        self, add: _Add, tiles_M: jax.Array, lo: jax.Array, hi: jax.Array, state: _Softmax
    ) -> _Softmax:
        S, H = self.k_LBKSH.shape[3:]
        width = min(KEY_TILE, S)
        together = min(max(BATCH // width, 1), len(tiles_M))
        first, stop = (tiles_M < lo // width).sum(), (tiles_M * width < hi).sum()
        padded_M = jnp.pad(tiles_M, (0, together), constant_values=-(-S // width))

        def visit(n: jax.Array, state: _Softmax) -> _Softmax:
            chosen_G = lax.dynamic_slice_in_dim(padded_M, first + n * together, together)
            start_G = jnp.minimum(chosen_G * width, S - width)  # the last tile may overhang the cache

            def read(x_LBKSH: jax.Array) -> jax.Array:
                def one(start: jax.Array) -> jax.Array:
                    at = (*self.where, start, jnp.int32(0))
                    return lax.dynamic_slice(x_LBKSH, at, (1, 1, 1, width, H))[0, 0, 0]

                return jax.vmap(one)(start_G).reshape(-1, H)

            j_GS = start_G[:, None] + jnp.arange(width, dtype=jnp.int32)
            counts_GS = (j_GS >= chosen_G[:, None] * width) & ~self.column_S[j_GS]
            batch = _Batch(read(self.k_LBKSH), read(self.v_LBKSH), j_GS.reshape(-1), counts_GS.reshape(-1))
            return add(batch, state)

        return lax.fori_loop(0, -(-jnp.maximum(stop - first, 0) // together), visit, state)


def _add(
    q_TH: jax.Array, batch: _Batch, visible_TS: jax.Array, scale: jax.Array, state: _Softmax
) -> _Softmax:
    s_TS = jnp.where(visible_TS, einsum("TH,SH->TS", q_TH, batch.k_SH) * scale, -jnp.inf)
    peak = jnp.maximum(state.peak, s_TS.max(-1))
    base = jnp.where(jnp.isneginf(peak), 0.0, peak)
    p_TS = jnp.exp(s_TS - base[:, None])
    shrink = jnp.exp(state.peak - base)
    out = state.out * shrink[:, None] + einsum("TS,SH->TH", p_TS.astype(batch.v_SH.dtype), batch.v_SH)
    return _Softmax(out, peak, state.total * shrink + p_TS.sum(-1))
