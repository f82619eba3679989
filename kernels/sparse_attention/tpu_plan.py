"""What the TPU kernel of sparse attention walks: counts a query block, and lists a head that stay in HBM."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.kernels.sparse_attention.lists import ON_TPU, lists_of
from qwen_jax.kernels.tpu import LANES

FIELDS = 5  # int32 a query block, see `Plan.counts`


class Plan(NamedTuple):
    """Lists of one piece: X = batch * heads, C = query blocks of the piece, M = tile distances, P = column slots.

    Attributes:
        counts: int32[X * C * 5], of every query block: bands that any of its query tiles has keys in, bands that all have,
            tiles of columns to walk, and the ends of those of the stages INTER and SUCC.
        near: int32[X, 1, M], the tile distances in a head's bands, ascending from 0; then anything.
        position: int32[X, P], the key position of every column slot; any for a slot without a column.
        left_out: int8[X, P, query tiles rounded up to lanes], 1 where a slot has no column that counts for a query tile: the
            column lies at or behind the query tile, or in one of its bands.
    """

    counts: jax.Array
    near: jax.Array
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
    kv_len_B: jax.Array,
    stage_starts: tuple[jax.Array, jax.Array],
    dca: bool,
    align: int,
) -> Plan:
    """The lists of `blocks` query blocks of `tiles` tiles each, from the tile on that position q_start lies in.

    Args:
        columns_BNS, bands_BNM, most_columns, q_start, kv_len_B: as in `api.attend_lines`.
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
    counts_XCF = jnp.stack(
        [
            jnp.where(real_XC, lists.nearer[:, 0, last_C + 1], 0),
            lists.nearer[:, 0, jnp.minimum(first_C, M - 1) + 1],
            jnp.where(real_XC, lists.succ_end[:, None] + own_XC, 0),
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
    return Plan(counts_XCF.reshape(-1), lists.near, lists.position, left_out_XPQ)


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
