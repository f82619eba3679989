"""What the TPU kernel of sparse attention walks: counts a query block, and lists a head that stay in HBM."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.kernels.sparse_attention.lists import ON_TPU, lists_of
from qwen_jax.kernels.tpu import LANES


class Plan(NamedTuple):
    """Lists of one piece: X = batch * heads, C = query blocks of the piece, M = tile distances, P = column slots.

    Attributes:
        counts: int32[X * C * (2 len(runs) + 3)], of every query block: how many runs of each length have keys that any of its
            query tiles sees; where the lists of these lengths begin in `near`; tiles of columns to walk, and the ends of those
            of the stages INTER and SUCC.
        near: int32[X, 1, M], a head's bands as runs of adjacent tile distances: the first distance of every run, one list for
            each length, ascending; distance 0 is a run of its own. Then anything.
        column_tiles: int32[X], most tiles of columns that any query block walks.
        position: int32[X, P], the key position of every column slot; any for a slot without a column.
        left_out: int8[X, P, query tiles rounded up to lanes], 1 where a slot has no column that counts for a query tile: the
            column lies at or behind the query tile, or in one of its bands.
    """

    counts: jax.Array
    near: jax.Array
    column_tiles: jax.Array
    position: jax.Array
    left_out: jax.Array


def plan(
    columns_BNS: jax.Array,
    bands_BNM: jax.Array,
    *,
    most_columns: int,
    q_start: jax.Array,
    blocks: int,
    tiles: int,
    runs: tuple[int, ...],
    kv_len_B: jax.Array,
    stage_starts: tuple[jax.Array, jax.Array],
    dca: bool,
    align: int,
) -> Plan:
    """The lists of `blocks` query blocks of `tiles` tiles each, from the tile on that position q_start lies in.

    Args:
        columns_BNS, bands_BNM, most_columns, q_start, kv_len_B: as in `api.attend_lines`.
        runs: lengths of runs, longest first, 1 last.
        stage_starts: positions of the first SUCC and the first INTRA key, multiples of BAND.
        dca: whether there are stages.
        align: column slots a tile.
    """
    B, N, S = columns_BNS.shape
    X, M = B * N, tile_distances(S)
    first_tile = q_start // BAND
    first_C = first_tile + jnp.arange(blocks, dtype=jnp.int32) * tiles
    last_C = jnp.minimum(first_C + tiles - 1, M - 1)
    lists = lists_of(
        columns_BNS, bands_BNM, most_columns=most_columns, last_tile=last_C[-1], dca=dca, align=align, making=ON_TPU,
        stage_tiles=(stage_starts[0] // BAND, stage_starts[1] // BAND),
    )  # fmt: skip
    real_XC = jnp.repeat(first_C * BAND < kv_len_B[:, None], N, axis=0)
    own_XC = -((lists.older[:, None] - lists.before[:, last_C]) // align)
    near_XM, nearer_RXM = _runs(lists.in_band, runs)
    begins_RX = jnp.cumsum(nearer_RXM[..., M], axis=0) - nearer_RXM[..., M]
    column_tiles_XC = jnp.where(real_XC, lists.succ_end[:, None] + own_XC, 0)
    counts_XCF = jnp.stack(
        [
            *jnp.where(real_XC, nearer_RXM[..., last_C + 1], 0),
            *jnp.broadcast_to(begins_RX[..., None], (len(runs), X, blocks)),
            column_tiles_XC,
            *(jnp.broadcast_to(end[:, None], (X, blocks)) for end in (lists.inter_end, lists.succ_end)),
        ],
        axis=-1,
    )
    left_out_XPQ = _left_out(
        lists.in_band,
        lists.position // BAND,
        lists.is_column,
        first_tile,
        -(-blocks * tiles // LANES) * LANES,
    )
    return Plan(
        counts_XCF.reshape(-1), near_XM[:, None], column_tiles_XC.max(axis=1), lists.position, left_out_XPQ
    )


def _runs(in_band_XM: jax.Array, runs: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(`Plan.near` as int32[X, M], how many runs of each length begin nearer than a distance, int32[runs, X, M + 1]).

    Adjacent bands are cut from the nearest on, into as many of the longest as there is room for, then of the next.
    """
    X, M = in_band_XM.shape
    distance_M = jnp.arange(M, dtype=jnp.int32)
    goes_on_XM = jnp.pad(in_band_XM[:, 1:-1] & in_band_XM[:, 2:], ((0, 0), (2, 0)))  # 0 stands alone
    first_XM = lax.cummax(jnp.where(goes_on_XM, 0, distance_M), axis=1)
    ends_XM = jnp.pad(~goes_on_XM[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    end_XM = lax.cummin(jnp.where(ends_XM, distance_M + 1, M), axis=1, reverse=True)
    before_XM, length_XM = distance_M - first_XM, end_XM - first_XM
    begin_RXM, cut_XM = [], jnp.zeros_like(length_XM)  # bands of a stretch in longer runs
    for run in runs:
        here_XM = (length_XM - cut_XM) // run * run
        inside_XM = (before_XM >= cut_XM) & (before_XM < cut_XM + here_XM)
        begin_RXM.append(in_band_XM & inside_XM & ((before_XM - cut_XM) % run == 0))
        cut_XM += here_XM
    begin_XRM = jnp.stack(begin_RXM, axis=1)
    rank_XRM = jnp.cumsum(begin_XRM.reshape(X, -1), axis=1, dtype=jnp.int32).reshape(begin_XRM.shape) - 1
    slot_XM = jnp.where(begin_XRM, rank_XRM, M).min(axis=1)
    rows_X, distance_XM = jnp.arange(X, dtype=jnp.int32)[:, None], jnp.broadcast_to(distance_M, (X, M))
    near_XM = (
        jnp.zeros((X, M), jnp.int32).at[rows_X, slot_XM].set(distance_XM, mode="drop", unique_indices=True)
    )
    nearer_RXM = jnp.cumsum(jnp.stack(begin_RXM), axis=2, dtype=jnp.int32)
    return near_XM, jnp.pad(nearer_RXM, ((0, 0), (0, 0), (1, 0)))


def _left_out(
    in_band_XM: jax.Array, tile_XP: jax.Array, is_column_XP: jax.Array, first_tile: jax.Array, queries: int
) -> jax.Array:
    """`Plan.left_out` of columns in key tiles tile_XP for `queries` tiles from first_tile on.

    A column's row is a window of the bands by distance, at first_tile - its key tile: whole rows of LANES are gathered, then
    shifted to where the window starts, a power of two at a time.
    """
    X, M = in_band_XM.shape
    begin = M  # entry of distance 0 in the row of distances: none is below 0
    rows = -(-(begin + M + queries) // LANES) + 1
    # Distance 0 is in every head's bands; what lies behind a query is left out like it.
    row_XW = jnp.pad(
        in_band_XM.astype(jnp.int8), ((0, 0), (begin, rows * LANES - begin - M)), constant_values=1
    )
    at_XP = first_tile - tile_XP + begin
    row_XEL, pairs = row_XW.reshape(X, rows, LANES), jnp.arange(X, dtype=jnp.int32)[:, None]
    apart = [row_XEL[pairs, at_XP // LANES + n] for n in range(queries // LANES + 1)]
    window = jnp.concatenate(apart, axis=-1)
    for power in range(LANES.bit_length() - 1):
        shift = 1 << power
        moved = jnp.pad(window[..., shift:], ((0, 0), (0, 0), (0, shift)))
        window = jnp.where((at_XP & shift)[..., None] > 0, moved, window)
    return jnp.where(is_column_XP[..., None], window[..., :queries], jnp.int8(1))
