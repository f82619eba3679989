"""Attention over chosen lines in plain XLA: work is proportional to the keys computed, not to the keys there are.

Heads run one after another, for each chose its own lines. A head's columns are the same for every query, so their keys and
values are gathered into one array, in key order, and read a batch at a time. A query tile then reads every key tile in its
bands, whole. Keys of such a tile that are columns are masked: they have counted already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.products import einsum
from qwen_jax.kernels.sparse_attention.bands import BAND
from qwen_jax.rope import Rotary

BATCH = 256  # keys a step; several tiles make one matrix product
TOGETHER = 4  # query tiles that walk side by side, each its own keys: more work a step


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
    bands_BNM: jax.Array,
    most_columns: int,
    layer: jax.Array | int,
    q_start: jax.Array | int,
    kv_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    band: int = BAND,
    share: Share = EVERYTHING,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.sparse_attention.api.attend_lines`; takes any s, T, start, band and device."""
    B, T, N, H = q_BTNH.shape
    K, S = k_LBKSH.shape[2:4]
    layer, q_start = jnp.int32(layer), jnp.int32(q_start)
    kv_len_B = jnp.asarray(kv_len_B, jnp.int32)
    C = -(-T // band) + 1  # tiles that T queries lie in if they start inside one
    together = min(TOGETHER, C)
    C = -(-C // together) * together  # those past the queries walk nothing
    into, first_tile = q_start % band, q_start // band
    i_T = q_start + jnp.arange(T, dtype=jnp.int32)
    q_PBTNH = rotary.query_stages(q_BTNH, i_T, dtype=k_LBKSH.dtype, backend="xla")
    tiles_PBTNH = jnp.zeros((*q_PBTNH.shape[:2], C * band, N, H), q_PBTNH.dtype)
    tiles_PBTNH = lax.dynamic_update_slice_in_dim(tiles_PBTNH, q_PBTNH, into, 2)
    q_XCPTH = jnp.einsum("PBCTNH->BNCPTH", tiles_PBTNH.reshape(-1, B, C, band, N, H)).reshape(
        B * N, C, -1, band, H
    )

    def one_head(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, q_CPTH, columns_S, bands_M = xs
        b, kv_head = x // N, x % N // (N // K)
        end = jnp.minimum(jnp.minimum(kv_len_B[b], share.capacity(S)), q_start + T)
        k_SH, v_SH = (_head_of(x, (layer, b, kv_head)) for x in (k_LBKSH, v_LBKSH))
        head = _Head.of(k_SH, v_SH, columns_S, bands_M, band, min(most_columns, S), end, share)

        def one_tile(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            c, q_PTH = xs
            return head.attend(q_PTH, first_tile + c, q_start, rotary, scale_B[b])

        return lax.map(one_tile, (jnp.arange(C, dtype=jnp.int32), q_CPTH), batch_size=together)

    heads = jnp.arange(B * N, dtype=jnp.int32)
    lines = columns_BNS.reshape(B * N, S), bands_BNM.reshape(B * N, -1)
    out_XCTH, lse_XCT = lax.map(one_head, (heads, q_XCPTH, *lines))
    out = jnp.einsum("BNTH->BTNH", out_XCTH.reshape(B, N, C * band, H))
    lse = jnp.einsum("BNT->BTN", lse_XCT.reshape(B, N, C * band))
    out, lse = (lax.dynamic_slice_in_dim(x, into, T, 1) for x in (out, lse))
    return out.astype(q_BTNH.dtype), lse


_Add = Callable[[_Batch, _Softmax], _Softmax]


class _Head(NamedTuple):
    """What all query tiles of one head share.

    Attributes:
        k_SH, v_SH: its part of the cache.
        end: keys there are, on all devices.
        column_S: bool, the chosen columns among them, by slot.
        bands_M: bool, tile distances to compute.
        band: positions a tile.
        share: which positions the cache holds.
        j_C, k_CH, v_CH: positions, keys and values of the columns in key order; past the last, `end` and anything.
    """

    k_SH: jax.Array
    v_SH: jax.Array
    end: jax.Array
    column_S: jax.Array
    bands_M: jax.Array
    band: int
    share: Share
    j_C: jax.Array
    k_CH: jax.Array
    v_CH: jax.Array

    @classmethod
    def of(
        cls,
        k_SH: jax.Array,
        v_SH: jax.Array,
        columns_S: jax.Array,
        bands_M: jax.Array,
        band: int,
        most_columns: int,
        end: jax.Array,
        share: Share,
    ) -> _Head:
        S = len(k_SH)
        column_S = columns_S & (share.position(jnp.arange(S, dtype=jnp.int32)) < end)
        # One batch more than there can be columns: a batch read from any place stays inside.
        slot_C = jnp.nonzero(column_S, size=most_columns + BATCH, fill_value=S)[0].astype(jnp.int32)
        k_CH, v_CH = (x.at[slot_C].get(mode="clip") for x in (k_SH, v_SH))
        j_C = jnp.where(slot_C < S, share.position(slot_C), end)
        return cls(k_SH, v_SH, end, column_S, bands_M, band, share, j_C, k_CH, v_CH)

    def attend(
        self, q_PTH: jax.Array, c: jax.Array, q_start: jax.Array, rotary: Rotary, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Query tile c, rotated for every stage P: (out float32[T, H], lse float32[T]); real ones start at q_start."""
        _, T, H = q_PTH.shape
        start = c * self.band
        i_T = start + jnp.arange(T, dtype=jnp.int32)
        # One past the last key that any query sees; nothing for a tile without a real query.
        last = jnp.where(start < self.end, jnp.minimum(start + T, self.end), 0)
        tiles = self._tiles(c)
        state = _Softmax(jnp.zeros((T, H)), jnp.full(T, -jnp.inf), jnp.zeros(T))
        for p, (lo, hi) in enumerate(rotary.stage_ranges(jnp.maximum(start, q_start), last).values()):

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

    @property
    def width(self) -> int:
        """Slots of a key tile: consecutive positions of one tile of `band`."""
        return min(self.band, self.share.blocks.size, len(self.k_SH))

    def _tiles(self, c: jax.Array) -> jax.Array:
        """The key tiles W in the bands of query tile c, ascending, then as many as there are."""
        W = -(-len(self.k_SH) // self.width)
        starts_W = self.share.position(jnp.arange(W, dtype=jnp.int32) * self.width)
        apart_W = c - starts_W // self.band
        in_band = (self.bands_M[jnp.maximum(apart_W, 0)] & (apart_W > 0)) | (apart_W == 0)
        return jnp.nonzero(in_band, size=W, fill_value=W)[0].astype(jnp.int32)

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
        self, add: _Add, tiles_W: jax.Array, lo: jax.Array, hi: jax.Array, state: _Softmax
    ) -> _Softmax:
        (S, H), W, width = self.k_SH.shape, len(tiles_W), self.width
        together = min(max(BATCH // width, 1), W)
        lo, hi = self.share.below(lo), self.share.below(hi)
        first, stop = (tiles_W < lo // width).sum(), (tiles_W * width < hi).sum()
        padded_W = jnp.pad(tiles_W, (0, together), constant_values=W)

        def visit(n: jax.Array, state: _Softmax) -> _Softmax:
            chosen_G = lax.dynamic_slice_in_dim(padded_W, first + n * together, together)
            start_G = jnp.minimum(chosen_G * width, S - width)  # the last tile may overhang the cache

            def read(x_SH: jax.Array) -> jax.Array:
                tiles = jax.vmap(lambda start: lax.dynamic_slice_in_dim(x_SH, start, width))(start_G)
                return tiles.reshape(-1, H)

            slot_GS = start_G[:, None] + jnp.arange(width, dtype=jnp.int32)
            counts_GS = (slot_GS >= chosen_G[:, None] * width) & ~self.column_S[slot_GS]
            j_S = self.share.position(slot_GS).reshape(-1)
            batch = _Batch(read(self.k_SH), read(self.v_SH), j_S, counts_GS.reshape(-1))
            return add(batch, state)

        return lax.fori_loop(0, -(-jnp.maximum(stop - first, 0) // together), visit, state)


def _head_of(x_LBKSH: jax.Array, at: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """One head's keys or values as an array of its own [S, H]: the layout in which columns are gathered is then no matter of
    the cache, which the TPU compiler copied whole in every layer."""
    return lax.optimization_barrier(x_LBKSH[at])


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
