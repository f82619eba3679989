"""The computed set of sparse attention in NumPy, straight from the contract: for tests and for the density of a run."""

from __future__ import annotations

import numpy as np

from qwen_jax.kernels.sparse_attention.bands import BAND


def computed_keys(
    columns_S: np.ndarray, bands_M: np.ndarray, i_T: np.ndarray, band: int = BAND
) -> np.ndarray:
    """bool[T, S]: the keys that queries at positions i_T of one head compute; the row's length is not looked at."""
    j_S = np.arange(len(columns_S))
    apart_TS = i_T[:, None] // band - j_S // band
    in_band_TS = np.where(apart_TS > 0, bands_M[np.maximum(apart_TS, 0)], apart_TS == 0)
    return (columns_S | in_band_TS) & (j_S <= i_T[:, None])


def computed_pairs(
    columns_S: np.ndarray,
    bands_M: np.ndarray,
    *,
    q_start: int,
    queries: int,
    kv_len: int,
    band: int = BAND,
) -> int:
    """How many (query, key) pairs one head computes for the real ones of `queries` positions from q_start on.

    A query tile sees whole key tiles at every distance D >= 1 in the bands, of all others before it the columns, and of its
    own what lies before each query.
    """
    M = len(bands_M)
    columns_M = np.bincount(np.flatnonzero(columns_S) // band, minlength=M)
    pairs, end = 0, min(q_start + queries, kv_len)
    for c in range(q_start // band, -(-end // band)):
        first, last = max(c * band, q_start), min((c + 1) * band, end)
        in_band_M = bands_M[c:0:-1]  # of key tiles 0 .. c - 1
        keys = band * int(in_band_M.sum()) + int(columns_M[:c][~in_band_M].sum())
        own = first - c * band + 1 + last - c * band  # keys of the first query and of the last, together
        pairs += (last - first) * keys + (last - first) * own // 2
    return pairs
