"""What the Hopper kernel of sparse attention walks: work items and lists, made on the device from the lines of one piece."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.kernels.blocks import Share
from qwen_jax.kernels.sparse_attention.bands import BAND
from qwen_jax.kernels.sparse_attention.lists import ON_GPU, lists_of
from qwen_jax.kernels.sparse_attention.tiles import Tiles, residues

_PADDING = 1 << 30  # the key tile of a slot without a column: before no query tile
_NO_OWN = 2 * BAND  # instead of own keys


class Plan(NamedTuple):
    """Lists of one piece: X = batch * heads, C = query tiles of the piece, M = tile distances, P = column slots; R residues of
    query tiles and K entries each, 1 and M unless the cache is a share (`tiles`).

    Attributes:
        items: int32[X * C * 9], the work, dearest heads first and each head's latest query tiles first: (index in X, query
            tile of the piece, real keys of its own key tile, ends of six segments of key tiles). The segments are the bands
            in the query's own chunk, in the chunk before and in older ones, then the columns in older chunks, in the chunk
            before, in the own one. The first key tile is the own one. If that is not here, the walk begins with the next
            band, and more than BAND own keys say so; if there is no other band, with nothing, in place of no own keys.
        near: int32[X * R * K], for query tiles of each residue the tile distances in a head's bands whose key tiles are here,
            ascending from 0; then anything.
        in_band: int8[X * M], by tile distance.
        column_tile: int32[X * P], the key tile of every column slot; a slot without a column has one past all others.
        position: int32[X, P], where in the cache the key of every slot lies; any for a slot without a column.
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
    share: Share | None = None,
) -> Plan:
    """The lists of `query_tiles` tiles from the one on that position q_start lies in.

    Args:
        columns_BNS, bands_BNM, most_columns, q_start, kv_len_B: as in `api.attend_lines`.
        stage_starts: positions of the first SUCC and the first INTRA key, multiples of BAND.
        dca: whether there are stages.
        share: which positions are in the cache, in whole tiles; None: all.
    """
    B, N, M = bands_BNM.shape
    X, tiles = B * N, Tiles(share)
    first_tile = q_start // BAND
    succ, intra = (start // BAND for start in stage_starts)
    tile_C = first_tile + jnp.arange(query_tiles, dtype=jnp.int32)
    c_C = jnp.minimum(tile_C, M - 1)
    here_C = tiles.below(c_C)  # key tiles before each query tile that are here
    lists = lists_of(
        columns_BNS,
        bands_BNM,
        most_columns=most_columns,
        last_tile=here_C[-1],
        stage_tiles=(tiles.below(succ), tiles.below(intra)),
        dca=dca,
        making=ON_GPU,
        distances_RK=tiles.distances(M),
    )

    residue_C = c_C % residues(share.blocks if share else None)
    bands = [
        lists.nearer[:, residue_C, here_C - tiles.below(lowest) + 1] for lowest in (intra, succ, jnp.int32(0))
    ]
    own_XC = -((lists.older[:, None] - lists.before[:, here_C]) // BAND)
    inter_end, succ_end = lists.inter_end[:, None], lists.succ_end[:, None]
    columns = [inter_end, succ_end, succ_end + own_XC]
    real_XC = jnp.repeat(tile_C * BAND < kv_len_B[:, None], N, axis=0)
    ends_XC = [jnp.where(real_XC, end, 1) for end in (*bands, *(bands[-1] + more for more in columns))]
    own_keys_XC = jnp.repeat(jnp.clip(kv_len_B[:, None] - tile_C * BAND, 0, BAND), N, axis=0)
    if share is not None:
        here_XC = jnp.broadcast_to(tiles.holds(tile_C), own_keys_XC.shape)
        next_XC = ~here_XC & (ends_XC[2] > 1)
        ends_XC = [end - next_XC for end in ends_XC]
        own_keys_XC = jnp.where(here_XC, own_keys_XC, jnp.where(next_XC, _NO_OWN, 0))

    dearest_X = jnp.argsort(-ends_XC[-1].sum(-1)).astype(jnp.int32)
    tile_XC = jnp.broadcast_to(jnp.arange(query_tiles, dtype=jnp.int32), (X, query_tiles))
    pair_XC = jnp.broadcast_to(jnp.arange(X, dtype=jnp.int32)[:, None], (X, query_tiles))
    items_XCF = jnp.stack([pair_XC, tile_XC, own_keys_XC, *ends_XC], -1)[dearest_X, ::-1]
    column_tile_XP = jnp.where(lists.is_column, tiles.position(lists.position // BAND), _PADDING)
    return Plan(
        items_XCF.reshape(-1),
        lists.near.reshape(-1),
        lists.in_band.astype(jnp.int8).reshape(-1),
        column_tile_XP.reshape(-1),
        lists.position,
    )
