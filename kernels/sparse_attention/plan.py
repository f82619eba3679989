"""What the Hopper kernel of sparse attention walks: lists made on the device, by XLA, from the lines of one piece.

Work is proportional to the positions in the cache and to the column slots, both small beside the attention: nothing sorts,
and nothing is stored a (query tile, key tile).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances

_PADDING = 1 << 30  # the key tile of a slot without a column: before no query tile


class Plan(NamedTuple):
    """Lists of one piece: X = batch * heads, C = query tiles of the piece, M = tile distances, P = column slots.

    Attributes:
        items: int32[X * C * 9], the work, dearest heads first and each head's latest query tiles first: (index in X, query
            tile of the piece, real keys of its own key tile, ends of six segments of key tiles). The segments are the bands
            in the query's own chunk, in the chunk before and in older ones, then the columns in older chunks, in the chunk
            before, in the own one.
        near: int32[X * M], the tile distances in a head's bands, ascending from 0; then anything.
        in_band: int8[X * M], by tile distance.
        column_tile: int32[X * P], the key tile of every column slot; a slot without a column has one past all others.
        position: int32[X, P], the key position of every slot; any for a slot without a column.
    """

    items: jax.Array
    near: jax.Array
    in_band: jax.Array
    column_tile: jax.Array
    position: jax.Array


def column_slots(most_columns: int, dca: bool) -> int:
    """P: columns of each stage start a tile of their own."""
    return (-(-most_columns // BAND) + (2 if dca else 0)) * BAND


def plan(
    columns_BNS: jax.Array,
    bands_BNM: jax.Array,
    *,
    most_columns: int,
    q_start: jax.Array,
    query_tiles: int,
    kv_len_B: jax.Array,
    stage_starts: tuple[jax.Array, jax.Array],
    dca: bool,
) -> Plan:
    """The lists of `query_tiles` tiles from the one on that position q_start lies in.

    Args:
        columns_BNS, bands_BNM, most_columns, q_start, kv_len_B: as in `api.attend_lines`.
        stage_starts: positions of the first SUCC and the first INTRA key, multiples of BAND.
        dca: whether there are stages.
    """
    B, N, S = columns_BNS.shape
    X, M = B * N, tile_distances(S)
    first_tile = q_start // BAND
    succ, intra = (start // BAND for start in stage_starts)

    bits_XMW = _words(columns_BNS.reshape(X, S), M)
    before_XM = jnp.minimum(_sums(lax.population_count(bits_XMW).sum(-1).astype(jnp.int32)), most_columns)
    tile_C = first_tile + jnp.arange(query_tiles, dtype=jnp.int32)
    c_C = jnp.minimum(tile_C, M - 1)
    inter_X, older_X, all_X = (before_XM[:, at] for at in (succ, intra, c_C[-1]))
    position_XP, valid_XP, tiles = _positions(
        bits_XMW, before_XM, (inter_X, older_X, all_X), column_slots(most_columns, dca)
    )

    in_band_XM = bands_BNM.reshape(X, M).at[:, 0].set(True)
    nearer_XM = _sums(in_band_XM.astype(jnp.int32))  # M + 1: bands nearer than a tile distance
    slot_XM = jnp.where(in_band_XM, nearer_XM[:, :-1], M)
    distance_XM = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), (X, M))
    rows_X = jnp.arange(X, dtype=jnp.int32)[:, None]
    near_XM = (
        jnp.zeros((X, M), jnp.int32).at[rows_X, slot_XM].set(distance_XM, mode="drop", unique_indices=True)
    )

    bands = [nearer_XM[:, c_C - lowest + 1] for lowest in (intra, succ, 0)]
    own_XC = _tiles_of(before_XM[:, c_C] - older_X[:, None])
    columns = [tiles[0][:, None], tiles[1][:, None], tiles[1][:, None] + own_XC]
    ends_XC = [*bands, *(bands[-1] + more for more in columns)]
    own_keys_XC = jnp.repeat(jnp.clip(kv_len_B[:, None] - tile_C * BAND, 0, BAND), N, axis=0)
    ends_XC = [jnp.where(own_keys_XC > 0, end, 1) for end in ends_XC]

    dearest_X = jnp.argsort(-ends_XC[-1].sum(-1)).astype(jnp.int32)
    tile_XC = jnp.broadcast_to(jnp.arange(query_tiles, dtype=jnp.int32), (X, query_tiles))
    pair_XC = jnp.broadcast_to(rows_X, (X, query_tiles))
    items_XCF = jnp.stack([pair_XC, tile_XC, own_keys_XC, *ends_XC], -1)[dearest_X, ::-1]
    column_tile_XP = jnp.where(valid_XP, position_XP // BAND, _PADDING)
    return Plan(
        items_XCF.reshape(-1),
        near_XM.reshape(-1),
        in_band_XM.astype(jnp.int8).reshape(-1),
        column_tile_XP.reshape(-1),
        position_XP,
    )


_BITS = 32


def _words(columns_XS: jax.Array, M: int) -> jax.Array:
    """uint32[X, M, words of a tile]: the columns of every key tile as bits, lowest first."""
    X, S = columns_XS.shape
    padded = jnp.pad(columns_XS, ((0, 0), (0, M * BAND - S))).reshape(X, M, BAND // _BITS, _BITS)
    weight = jnp.uint32(1) << jnp.arange(_BITS, dtype=jnp.uint32)
    return jnp.where(padded, weight, jnp.uint32(0)).sum(-1, dtype=jnp.uint32)


def _sums(x_XM: jax.Array) -> jax.Array:
    """int32[X, M + 1]: the sum of all before each place, and of all."""
    return jnp.pad(jnp.cumsum(x_XM, axis=-1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _tiles_of(count: jax.Array) -> jax.Array:
    return -(-count // BAND)


def _positions(
    bits_XMW: jax.Array, before_XM: jax.Array, counts: tuple[jax.Array, jax.Array, jax.Array], slots: int
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Where the columns lie: (position int32[X, P], is there one, end of the INTER tiles and of the SUCC tiles, int32[X]).

    counts: columns in INTER, those and in SUCC, all, int32[X].
    """
    inter_X, older_X, all_X = (x[:, None] for x in counts)
    inter_end = _tiles_of(inter_X)
    succ_end = inter_end + _tiles_of(older_X - inter_X)
    slot_P = jnp.arange(slots, dtype=jnp.int32)[None]
    tile_P = slot_P // BAND
    in_inter, in_succ = tile_P < inter_end, tile_P < succ_end
    # A stage's columns start a tile; those before it left part of their last tile empty.
    rank_XP = slot_P - jnp.where(
        in_inter, 0, jnp.where(in_succ, inter_end * BAND - inter_X, succ_end * BAND - older_X)
    )
    valid_XP = rank_XP < jnp.where(in_inter, inter_X, jnp.where(in_succ, older_X, all_X))

    def at(x_XM: jax.Array, index_XP: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_XM, index_XP, axis=-1)

    # The last key tile with no more than `rank` columns before it holds the one of that rank.
    M = bits_XMW.shape[1]
    tile_XP = jnp.zeros_like(rank_XP)
    for step in (1 << power for power in reversed(range(M.bit_length()))):
        further = jnp.minimum(tile_XP + step, M)
        reached = (tile_XP + step < M) & (at(before_XM, further) <= rank_XP)
        tile_XP = jnp.where(reached, further, tile_XP)
    rank_XP = rank_XP - at(before_XM, tile_XP)
    word_XP = jnp.zeros_like(rank_XP)
    for w in range(bits_XMW.shape[2]):
        count = lax.population_count(at(bits_XMW[:, :, w], tile_XP)).astype(jnp.int32)
        passed = (word_XP == w) & (rank_XP >= count)
        rank_XP, word_XP = jnp.where(passed, rank_XP - count, rank_XP), jnp.where(passed, w + 1, word_XP)
    word_XP = jnp.minimum(word_XP, bits_XMW.shape[2] - 1)
    bits_XP = at(bits_XMW.reshape(bits_XMW.shape[0], -1), tile_XP * bits_XMW.shape[2] + word_XP)
    bit_XP = jnp.zeros_like(rank_XP)
    for width in (16, 8, 4, 2, 1):
        low = (bits_XP >> bit_XP.astype(jnp.uint32)) & jnp.uint32((1 << width) - 1)
        count = lax.population_count(low).astype(jnp.int32)
        passed = rank_XP >= count
        rank_XP, bit_XP = (
            jnp.where(passed, rank_XP - count, rank_XP),
            jnp.where(passed, bit_XP + width, bit_XP),
        )
    position_XP = (tile_XP * bits_XMW.shape[2] + word_XP) * _BITS + bit_XP
    return jnp.where(valid_XP, position_XP, 0), valid_XP, (inter_end[:, 0], succ_end[:, 0])
