"""What the Hopper kernel of sparse attention walks: work items and lists, made on the device from the lines of one piece."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.kernels.sparse_attention.lists import ON_GPU, lists_of

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
    tile_C = first_tile + jnp.arange(query_tiles, dtype=jnp.int32)
    c_C = jnp.minimum(tile_C, M - 1)
    lists = lists_of(
        columns_BNS,
        bands_BNM,
        most_columns=most_columns,
        last_tile=c_C[-1],
        stage_tiles=(succ, intra),
        dca=dca,
        making=ON_GPU,
    )

    bands = [lists.nearer[:, c_C - lowest + 1] for lowest in (intra, succ, 0)]
    own_XC = -((lists.older[:, None] - lists.before[:, c_C]) // BAND)
    inter_end, succ_end = lists.inter_end[:, None], lists.succ_end[:, None]
    columns = [inter_end, succ_end, succ_end + own_XC]
    ends_XC = [*bands, *(bands[-1] + more for more in columns)]
    own_keys_XC = jnp.repeat(jnp.clip(kv_len_B[:, None] - tile_C * BAND, 0, BAND), N, axis=0)
    ends_XC = [jnp.where(own_keys_XC > 0, end, 1) for end in ends_XC]

    dearest_X = jnp.argsort(-ends_XC[-1].sum(-1)).astype(jnp.int32)
    tile_XC = jnp.broadcast_to(jnp.arange(query_tiles, dtype=jnp.int32), (X, query_tiles))
    pair_XC = jnp.broadcast_to(jnp.arange(X, dtype=jnp.int32)[:, None], (X, query_tiles))
    items_XCF = jnp.stack([pair_XC, tile_XC, own_keys_XC, *ends_XC], -1)[dearest_X, ::-1]
    column_tile_XP = jnp.where(lists.is_column, lists.position // BAND, _PADDING)
    return Plan(
        items_XCF.reshape(-1),
        lists.near.reshape(-1),
        lists.in_band.astype(jnp.int8).reshape(-1),
        column_tile_XP.reshape(-1),
        lists.position,
    )
