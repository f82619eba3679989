"""Lines chosen by attention per key computed: `--sparsity bands`.

The published rule ranks diagonals one by one, but whole bands are computed: a lone diagonal costs one or two bands of keys a
query. Here a band competes as what it is, `band` keys a query, with columns, one key a query each. They share as many computed
pairs as the published choice would have cost the same head in the same piece, or a given share of them.

Both scores come from the sums of the last queries' attention A, n rows that end at key e - 1 (`kernels.line_scores`). One
entry A[i, j] is part of column j's sum and of diagonal i - j's, and whether it belongs to a line of the one kind or of the
other shows in its surroundings: a diagonal of mass a adds a / n to each of n neighbouring columns and a column spreads over n
diagonals likewise. So a column is worth what stands above the mean of the diagonals that cross it, and a band what its
diagonals hold once that is taken out. So near the end that only forced bands reach it a column is worth nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.cutoffs.ranks import Heavy
from qwen_jax.kernels.line_scores.api import FORCED_COLUMNS
from qwen_jax.kernels.sparse_attention.bands import BAND, bands_of, tile_distances
from qwen_jax.sparsity.selection import best


class Piece(NamedTuple):
    """Queries [start, end) of a row, int32: start is a scalar, end_B [B]; a row without queries has end_B <= start."""

    start: jax.Array
    end_B: jax.Array


def computed_pairs(columns_BNS: jax.Array, bands_BNM: jax.Array, piece: Piece, band: int = BAND) -> jax.Array:
    """Pairs (query, key) that a piece computes for bool columns and bands, float32[B, N]; see `attend_lines`."""
    return _pairs(_by_tile(columns_BNS, band).sum(-1), bands_BNM, piece, band)


def band_scores(diagonals_BNS: jax.Array, band: int = BAND) -> jax.Array:
    """float32[..., M]: attention in each band, from the sums of diagonals, float32[..., S] by distance.

    Of all queries that look back d = a * band + e, the share 1 - e / band find their key a tiles back, the others a + 1.
    """
    tiles = _by_tile(diagonals_BNS, band)
    farther = jnp.arange(band) / band
    near, far = (tiles * (1 - farther)).sum(-1), (tiles * farther).sum(-1)
    return near.at[..., 1:].add(far[..., :-1])


def select_bands(
    columns_BNS: jax.Array,
    diagonals_BNS: jax.Array,
    pairs_BN: jax.Array,
    piece: Piece,
    *,
    last_queries: int,
    most_columns: int,
    band: int = BAND,
) -> tuple[jax.Array, jax.Array]:
    """The columns, bool[B, N, S], and bands, bool[B, N, M], that hold most attention for at most `pairs_BN` computed pairs.

    Args:
        columns_BNS, diagonals_BNS: float32 scores of `kernels.line_scores`; columns and bands with a score of +inf are
            always chosen, whatever they cost, those of -inf never.
        pairs_BN: float32, what may be computed.
        piece: the queries that will use the lines.
        last_queries: queries that the scores are sums over.
        most_columns: no head gets more; both static.
        band: positions a tile, static.
    """
    S = columns_BNS.shape[-1]
    own_BNS, score_BNM = _worth(columns_BNS, diagonals_BNS, piece, last_queries, band)
    worth_BNX = jnp.concatenate([own_BNS, score_BNM], -1)
    rows_B = jnp.maximum(piece.end_B - piece.start, 1)[:, None].astype(jnp.float32)

    def cut(keys_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is worth most of at most so many keys a query; a band that they pay in part is left out."""
        chosen_BNX = best(worth_BNX, jnp.floor(keys_BN) - (band - 1), Heavy(S, band)) | jnp.isposinf(
            worth_BNX
        )
        return chosen_BNX[..., :S], chosen_BNX[..., S:]

    def spare(columns_BNS: jax.Array, bands_BNM: jax.Array) -> jax.Array:
        """Keys a query that may be computed yet."""
        return (pairs_BN - computed_pairs(columns_BNS, bands_BNM, piece, band)) / rows_B

    # Columns in bands are paid twice here, and own tiles whole. What that leaves is spent once more; more lines leave no less.
    lines = cut(pairs_BN / rows_B)
    paid_BN = lines[0].sum(-1) + band * lines[1].sum(-1)
    columns_BNS, bands_BNM = cut(paid_BN + spare(*lines))
    # Columns take the rest.
    count_BN = columns_BNS.sum(-1) + jnp.maximum(jnp.floor(spare(columns_BNS, bands_BNM)), 0)
    count_BN = jnp.where(piece.end_B[:, None] > piece.start, jnp.minimum(count_BN, most_columns), 0)
    return best(own_BNS, count_BN), bands_BNM


def _worth(
    columns_BNS: jax.Array, diagonals_BNS: jax.Array, piece: Piece, last_queries: int, band: int
) -> tuple[jax.Array, jax.Array]:
    """What a key of each column and of each band, [B, N, M], holds; +inf: forced, -inf: never to be chosen."""
    end_B11 = piece.end_B[:, None, None]
    n_B11 = jnp.clip(end_B11 - piece.start, 1, last_queries)
    distance_S = jnp.arange(diagonals_BNS.shape[-1])
    # Of forced lines only the rank is known, not the mass: diagonals that run into forced columns say nothing either. Both are
    # taken for background.
    known = jnp.isfinite(diagonals_BNS) & (distance_S < end_B11 - n_B11 - FORCED_COLUMNS)
    background_BN1 = jnp.where(known, diagonals_BNS, 0.0).sum(-1, keepdims=True) / jnp.maximum(
        known.sum(-1, keepdims=True), 1
    )
    mass_BNS = jnp.where(known, diagonals_BNS, jnp.where(distance_S < end_B11, background_BN1, 0.0))
    finite_BNS = jnp.isfinite(columns_BNS)
    crossing_BNS = _from_the_end(_window(mass_BNS, last_queries, before=True), piece.end_B) / n_B11
    above_BNS = jnp.where(finite_BNS, jnp.maximum(columns_BNS - crossing_BNS, 0), 0.0)
    spread_BNS = _window(_from_the_end(above_BNS, piece.end_B), last_queries, before=False) / n_B11
    mass_BNS = jnp.where(known, jnp.maximum(mass_BNS - spread_BNS, 0), mass_BNS)

    forced_BNM = bands_of(jnp.isposinf(diagonals_BNS), band)
    # Bands from 0 on that are all forced; where every one is, nothing is left to choose.
    nearest_BN1 = jnp.argmin(forced_BNM, -1, keepdims=True)
    first_BN1 = ((end_B11 - 1) // band - (nearest_BN1 - 1)) * band
    own_BNS = jnp.where(finite_BNS, jnp.where(distance_S < first_BN1, above_BNS, -jnp.inf), columns_BNS)

    last_B11 = jnp.where(end_B11 > piece.start, end_B11, 0)
    there_M = jnp.arange(tile_distances(diagonals_BNS.shape[-1], band)) * band < last_B11
    score_BNM = jnp.where(there_M, band_scores(mass_BNS, band) / band, -jnp.inf)
    return own_BNS, jnp.where(forced_BNM, jnp.inf, score_BNM)


def _pairs(columns_BNM: jax.Array, bands_BNM: jax.Array, piece: Piece, band: int) -> jax.Array:
    """`computed_pairs` from the number of columns in each key tile."""
    M = bands_BNM.shape[-1]
    start, end_B = piece.start, jnp.maximum(piece.end_B, piece.start)
    distance_M = jnp.arange(M, dtype=jnp.int32)
    rows_BM = jnp.maximum(end_B[:, None] - jnp.maximum(start, distance_M * band), 0)
    whole_BN = band * jnp.where(bands_BNM & (distance_M > 0), rows_BM[:, None], 0).sum(-1, dtype=jnp.float32)

    # A column is computed singly by the queries of the tiles behind its own from which it lies in none of the bands.
    single_BNM = (~bands_BNM & (distance_M > 0)).astype(jnp.int32)
    before_BNX = jnp.pad(jnp.cumsum(single_BNM, -1), ((0, 0), (0, 0), (1, 0)))
    first, last_B = start // band, jnp.maximum(end_B - 1, 0) // band

    def at(x: jax.Array, index_BM: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, jnp.maximum(index_BM, 0)[:, None], -1)

    nearest_BM = jnp.broadcast_to(first - distance_M, rows_BM.shape)
    farthest_BM = last_B[:, None] - distance_M
    tiles_BNM = at(before_BNX, farthest_BM + 1) - at(before_BNX, nearest_BM)
    no_rows_BNM = at(single_BNM, nearest_BM) * (
        start - first * band
    )  # rows of the first and of the last tile
    no_rows_BNM += at(single_BNM, farthest_BM) * ((last_B + 1) * band - end_B)[:, None, None]
    rows_BNM = band * tiles_BNM - no_rows_BNM
    singly_BN = (columns_BNM * rows_BNM).sum(-1, dtype=jnp.float32)
    own_B = _triangle(end_B, band) - _triangle(start, band)
    return jnp.where(end_B > start, (whole_BN + singly_BN).T + own_B, 0.0).T


def _triangle(position: jax.Array, band: int) -> jax.Array:
    """Pairs within one tile of all queries before `position`, float32."""
    tiles, rest = position // band, position % band
    return tiles.astype(jnp.float32) * (band * (band + 1) // 2) + (rest * (rest + 1) // 2)


def _by_tile(x: jax.Array, band: int) -> jax.Array:
    """[..., S] as [..., M, band], padded with zeros."""
    S = x.shape[-1]
    M = tile_distances(S, band)
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, M * band - S)]).reshape(*x.shape[:-1], M, band)


def _window(x: jax.Array, width: int, *, before: bool) -> jax.Array:
    """The sum of `width` neighbours along the last axis: of those up to each entry, or of those from it on."""
    padding = [(0, 0)] * (x.ndim - 1) + [(width - 1, 0) if before else (0, width - 1)]
    return lax.reduce_window(x, 0.0, lax.add, (1,) * (x.ndim - 1) + (width,), (1,) * x.ndim, padding)


def _from_the_end(x_BNS: jax.Array, end_B: jax.Array) -> jax.Array:
    """Entry t of row b is x's entry end_B[b] - 1 - t: by key what was by distance from the last query, and back."""
    S = x_BNS.shape[-1]
    return jax.vmap(lambda x, end: jnp.roll(x[:, ::-1], end - S, -1))(x_BNS, end_B)
