"""Chosen diagonals as bands of tiles: the set that sparse attention computes, whatever runs it.

Positions are cut into tiles of `band`. A diagonal at distance d = a * band + e crosses, for the queries of any tile c, the key
tile c - a, and c - a - 1 as well unless e = 0: which tile distances it touches does not depend on c. So one list of tile
distances a head serves every query tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BAND = 128  # positions a tile


def tile_distances(capacity: int, band: int = BAND) -> int:
    """M, how many tile distances 0 .. M - 1 there are in a cache of `capacity` positions."""
    return -(-capacity // band)


def bands_of(diagonals_BNS: jax.Array, band: int = BAND) -> jax.Array:
    """bool[..., M]: the tile distances that chosen diagonals, bool[..., S] by distance i - j, touch; always 0."""
    S = diagonals_BNS.shape[-1]
    M = tile_distances(S, band)
    unused = [(0, 0)] * (diagonals_BNS.ndim - 1)
    tiles = jnp.pad(diagonals_BNS, [*unused, (0, M * band - S)]).reshape(*diagonals_BNS.shape[:-1], M, band)
    beyond = jnp.pad(tiles[..., 1:].any(-1), [*unused, (1, 0)])[..., :M]
    return (tiles.any(-1) | beyond).at[..., 0].set(True)
