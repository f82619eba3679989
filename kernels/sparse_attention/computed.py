"""Which keys the XLA backend computes for given lines, in NumPy: for tests and for the density of a run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def computed_keys(
    columns_S: np.ndarray,
    diagonals_S: np.ndarray,
    *,
    q_start: int,
    queries: int,
    kv_len: int,
    query_tile: int,
    key_tile: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For every query tile of one head: (its query positions int64[T], the keys bool[S] that it computes).

    Those are the columns, and all keys of every aligned key tile that holds key i - d of a query i of the tile, d being a
    chosen distance. Each query computes those of them that it sees: j <= i and j < kv_len.
    """
    S = len(columns_S)
    distances = np.flatnonzero(diagonals_S)
    key_tile, query_tile = min(key_tile, S), min(query_tile, queries)
    for first in range(q_start, q_start + queries, query_tile):
        i = np.arange(first, min(first + query_tile, q_start + queries, kv_len))
        keys = columns_S.copy()
        if len(i):
            # Key tiles from the one of the first query's key to the one of the last query's: all between are touched.
            lowest, highest = np.maximum(i[0] - distances, 0) // key_tile, (i[-1] - distances) // key_tile
            edges = np.zeros(S // key_tile + 2, np.int64)
            there = i[-1] >= distances
            np.add.at(edges, lowest[there], 1)
            np.add.at(edges, highest[there] + 1, -1)
            keys |= np.repeat(np.cumsum(edges) > 0, key_tile)[:S]
        keys[kv_len:] = False
        yield i, keys


def computed_pairs(columns_S: np.ndarray, diagonals_S: np.ndarray, **piece: int) -> int:
    """Number of (query, key) pairs that one head computes; arguments as in `computed_keys`."""
    pairs = 0
    for i, keys in computed_keys(columns_S, diagonals_S, **piece):
        seen = np.cumsum(keys)
        pairs += int(seen[np.minimum(i, len(keys) - 1)].sum())
    return pairs
