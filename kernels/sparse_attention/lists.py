"""The lines of one piece as lists, made on the device by XLA: what the plans of all kernels of sparse attention start from.

Work is proportional to the positions in the cache and to the column slots, both small beside the attention: nothing sorts,
and nothing is stored a (query tile, key tile).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.products import einsum
from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances


@dataclasses.dataclass(frozen=True)
class Making:
    """How lists are made, by what the compiler makes well of it.

    Attributes:
        bits: columns that one word of bits holds.
        product: whether words are added up by a product, exactly in any precision, one head after another, or by integer sums.
        loops: whether steps that follow each other are loops, or written out.
    """

    bits: int
    product: bool
    loops: bool

    def repeat(self, count: int, step: Callable[[Any, Any], Any], start: Any) -> Any:
        """`step(n, value)` for n = 0 to count - 1."""
        if self.loops:
            return lax.fori_loop(0, count, step, start)
        return functools.reduce(lambda value, n: step(jnp.int32(n), value), range(count), start)


ON_GPU = Making(bits=32, product=False, loops=False)
# The TPU's compiler takes minutes to lay out tiles of many heads at once, and as long for searches that are written out.
ON_TPU = Making(bits=16, product=True, loops=True)


class Lists(NamedTuple):
    """Lists of all heads: X = batch * heads, M = tile distances, W = key tiles in the cache, P = column slots.

    R and K are 1 and M, or the shape of `distances_RK`; entry k stands for the distance distances_RK[r, k], or k.

    Attributes:
        near: int32[X, R, K], the tile distances in a head's bands, ascending from 0; then anything.
        nearer: int32[X, R, K + 1], how many bands there are among the entries before each.
        in_band: bool[X, M], by tile distance.
        before: int32[X, W + 1], how many columns lie in earlier key tiles.
        older: int32[X], how many of them lie before the queries' own chunk.
        position: int32[X, P], where in the cache the key of every column slot lies, ascending; any for a slot without a column.
        is_column: bool[X, P], which slots have one: columns of each stage start a tile of slots.
        inter_end, succ_end: int32[X], ends of the tiles of slots in the stages INTER and SUCC.
    """

    near: jax.Array
    nearer: jax.Array
    in_band: jax.Array
    before: jax.Array
    older: jax.Array
    position: jax.Array
    is_column: jax.Array
    inter_end: jax.Array
    succ_end: jax.Array


def column_slots(most_columns: int, dca: bool, align: int) -> int:
    """P: columns of each stage start a tile of `align` slots of their own."""
    return (-(-most_columns // align) + (2 if dca else 0)) * align


def lists_of(
    columns_BNS: jax.Array,
    bands_BNM: jax.Array,
    *,
    most_columns: int,
    last_tile: jax.Array,
    stage_tiles: tuple[jax.Array, jax.Array],
    dca: bool,
    making: Making,
    align: int = BAND,
    distances_RK: jax.Array | None = None,
) -> Lists:
    """The lists of a piece. Key tiles are counted as they lie in the cache.

    Args:
        columns_BNS, bands_BNM, most_columns: as in `api.attend_lines`.
        last_tile: the key tile of the piece's last queries, at most W: no column from there on is laid out.
        stage_tiles: key tiles where the SUCC and the INTRA keys start.
        dca: whether there are stages.
        making: by which operations; the lists are the same.
        align: slots a tile.
        distances_RK: lists of distances to choose from instead of all, see `tiles.Tiles.distances`.
    """
    B, N, S = columns_BNS.shape
    X, M = B * N, bands_BNM.shape[-1]
    bits_XMW = _words(columns_BNS.reshape(X, S), tile_distances(S), making)
    before_XM = jnp.minimum(_sums(lax.population_count(bits_XMW).sum(-1).astype(jnp.int32)), most_columns)
    inter_X, older_X, all_X = (before_XM[:, at] for at in (*stage_tiles, last_tile))
    slots = column_slots(most_columns, dca, align)
    position_XP, is_column_XP, ends = _positions(
        bits_XMW, before_XM, (inter_X, older_X, all_X), slots, align, making
    )

    in_band_XM = bands_BNM.reshape(X, M).at[:, 0].set(True)
    if distances_RK is None:
        distances_RK, listed_XRK = jnp.arange(M, dtype=jnp.int32)[None], in_band_XM[:, None]
    else:
        listed_XRK = (distances_RK < M) & in_band_XM[:, jnp.minimum(distances_RK, M - 1)]
    shape = X, *distances_RK.shape
    listed_YK = listed_XRK.reshape(-1, shape[-1])  # Y = X * R
    nearer_YK = _sums(listed_YK.astype(jnp.int32))
    place_YK = jnp.where(listed_YK, nearer_YK[:, :-1], shape[-1])
    rows_Y = jnp.arange(len(listed_YK), dtype=jnp.int32)[:, None]
    distance_YK = jnp.broadcast_to(distances_RK, shape).reshape(-1, shape[-1])
    near_YK = (
        jnp.zeros_like(distance_YK).at[rows_Y, place_YK].set(distance_YK, mode="drop", unique_indices=True)
    )
    near_XRK, nearer_XRK = near_YK.reshape(shape), nearer_YK.reshape(*shape[:2], -1)
    return Lists(near_XRK, nearer_XRK, in_band_XM, before_XM, older_X, position_XP, is_column_XP, *ends)


def _words(columns_XS: jax.Array, M: int, making: Making) -> jax.Array:
    """uint32[X, M, words of a tile]: the columns of every key tile as bits, lowest first."""
    X, S = columns_XS.shape
    padded_XS = jnp.pad(columns_XS, ((0, 0), (0, M * BAND - S)))
    if not making.product:
        weight = jnp.uint32(1) << jnp.arange(making.bits, dtype=jnp.uint32)
        bits = padded_XS.reshape(X, M, BAND // making.bits, making.bits)
        return jnp.where(bits, weight, jnp.uint32(0)).sum(-1, dtype=jnp.uint32)
    place, word = jnp.arange(BAND)[:, None], jnp.arange(BAND // making.bits)
    weight_PW = jnp.where(place // making.bits == word, 1 << (place % making.bits), 0).astype(jnp.bfloat16)

    def one_head(columns_S: jax.Array) -> jax.Array:
        tiles_MP = columns_S.astype(jnp.bfloat16).reshape(M, BAND)
        return einsum("MP,PW->MW", tiles_MP, weight_PW).astype(jnp.uint32)

    return lax.map(one_head, padded_XS)


def _sums(x_XM: jax.Array) -> jax.Array:
    """int32[X, M + 1]: the sum of all before each place, and of all."""
    return jnp.pad(jnp.cumsum(x_XM, axis=-1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _positions(
    bits_XMW: jax.Array,
    before_XM: jax.Array,
    counts: tuple[jax.Array, jax.Array, jax.Array],
    slots: int,
    align: int,
    making: Making,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Where the columns lie: (position int32[X, P], is there one, end of the INTER tiles and of the SUCC tiles, int32[X]).

    counts: columns in INTER, those and in SUCC, all, int32[X].
    """
    inter_X, older_X, all_X = (x[:, None] for x in counts)
    inter_end = -(-inter_X // align)
    succ_end = inter_end - (inter_X - older_X) // align
    slot_P = jnp.arange(slots, dtype=jnp.int32)[None]
    tile_P = slot_P // align
    in_inter, in_succ = tile_P < inter_end, tile_P < succ_end
    # A stage's columns start a tile; those before it left part of their last tile empty.
    rank_XP = slot_P - jnp.where(
        in_inter, 0, jnp.where(in_succ, inter_end * align - inter_X, succ_end * align - older_X)
    )
    valid_XP = rank_XP < jnp.where(in_inter, inter_X, jnp.where(in_succ, older_X, all_X))

    def at(x_XM: jax.Array, index_XP: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x_XM, index_XP, axis=-1)

    # The last key tile with no more than `rank` columns before it holds the one of that rank.
    M, words = bits_XMW.shape[1:]
    powers = M.bit_length()

    def nearer(n: jax.Array, tile_XP: jax.Array) -> jax.Array:
        step = jnp.int32(1) << (powers - 1 - n)
        further = jnp.minimum(tile_XP + step, M)
        reached = (tile_XP + step < M) & (at(before_XM, further) <= rank_XP)
        return jnp.where(reached, further, tile_XP)

    tile_XP = making.repeat(powers, nearer, jnp.zeros_like(rank_XP))
    flat_XW = bits_XMW.reshape(bits_XMW.shape[0], -1)

    def later(n: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rank_XP, word_XP = found
        count = lax.population_count(at(flat_XW, tile_XP * words + n)).astype(jnp.int32)
        passed = (word_XP == n) & (rank_XP >= count)
        return jnp.where(passed, rank_XP - count, rank_XP), jnp.where(passed, n + 1, word_XP)

    start = rank_XP - at(before_XM, tile_XP), jnp.zeros_like(rank_XP)
    rank_XP, word_XP = making.repeat(words, later, start)
    word_XP = jnp.minimum(word_XP, words - 1)
    bits_XP = at(flat_XW, tile_XP * words + word_XP)
    bit_XP = jnp.zeros_like(rank_XP)
    for width in (1 << power for power in reversed(range(making.bits.bit_length() - 1))):
        low = (bits_XP >> bit_XP.astype(jnp.uint32)) & jnp.uint32((1 << width) - 1)
        count = lax.population_count(low).astype(jnp.int32)
        passed = rank_XP >= count
        rank_XP, bit_XP = (
            jnp.where(passed, rank_XP - count, rank_XP),
            jnp.where(passed, bit_XP + width, bit_XP),
        )
    position_XP = (tile_XP * words + word_XP) * making.bits + bit_XP
    return jnp.where(valid_XP, position_XP, 0), valid_XP, (inter_end[:, 0], succ_end[:, 0])
