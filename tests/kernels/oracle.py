"""Attention in NumPy float64, straight from the definition: a distance for every (query, key) pair, one softmax over all keys.

Nothing here rotates a vector at a position: a score is Re(sum_f q_f conj(k_f) exp(i M theta_f)) over the rotation pairs f, with
M[i, j] written out piece by piece (`algorithms.md` 2.2). The code under test rotates and caches: it can only agree by being
right.
"""

from __future__ import annotations

import math

import numpy as np


def distance(i: int, j: int, s: int | None, clip: int) -> int:
    """The RoPE distance at which query i sees key j: the three pieces of dual chunk attention, or i - j when s is None."""
    if s is None:
        return i - j
    chunks_apart = i // s - j // s
    if chunks_apart == 0:
        return i % s - j % s
    if chunks_apart == 1:
        return min(i % s + s, clip) - j % s
    return min(2 * s - 1, clip) - j % s


def distances(i_T: np.ndarray, j_S: np.ndarray, s: int | None, clip: int) -> np.ndarray:
    """int64[T, S]."""
    return np.array([[distance(int(i), int(j), s, clip) for j in j_S] for i in i_T])


def temperature(length: int, original: int) -> float:
    """m(L) of `algorithms.md` 3.1."""
    return 1.0 if original == 0 else max(1.0, 0.1 * math.log(length / original) + 1.0)


def attention(
    q_TNH: np.ndarray,
    k_SKH: np.ndarray,
    v_SKH: np.ndarray,
    *,
    i_T: np.ndarray,
    kv_len: int,
    theta: float,
    s: int | None = None,
    clip: int = 0,
    scale: float,
    key_scale_S: np.ndarray | None = None,
    keep_TNS: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One row: queries at positions i_T, keys at positions 0 .. S - 1, none of them rotated; `keep_TNS` narrows what is seen.

    Returns:
        (out float64[T, N, H], lse float64[T, N]); 0 and -inf for a query that sees no key.
    """
    T, N, H = q_TNH.shape
    S, K, _ = k_SKH.shape
    j_S = np.arange(S)
    speed_F = theta ** (-np.arange(0, H, 2) / H)
    q = q_TNH.astype(np.float64)
    k = np.repeat(k_SKH.astype(np.float64), N // K, axis=1)
    v = np.repeat(v_SKH.astype(np.float64), N // K, axis=1)
    q_TNF = q[..., : H // 2] + 1j * q[..., H // 2 :]
    k_SNF = k[..., : H // 2] + 1j * k[..., H // 2 :]
    out, lse = np.zeros((T, N, H)), np.full((T, N), -np.inf)
    for t, i in enumerate(i_T):
        seen = j_S[(j_S <= i) & (j_S < kv_len)]
        if not len(seen):
            continue
        m_S = distances(np.array([i]), seen, s, clip)[0]
        turn_SF = np.exp(1j * m_S[:, None] * speed_F)
        scores_NS = np.einsum("NF,SNF,SF->NS", q_TNF[t], k_SNF[seen].conj(), turn_SF).real * scale
        if key_scale_S is not None:
            scores_NS = scores_NS * key_scale_S[seen]
        if keep_TNS is not None:
            scores_NS = np.where(keep_TNS[t][:, seen], scores_NS, -np.inf)
        peak_N = scores_NS.max(1)
        some_N = np.isfinite(peak_N)
        p_NS = np.exp(scores_NS[some_N] - peak_N[some_N, None])
        lse[t, some_N] = peak_N[some_N] + np.log(p_NS.sum(1))
        out[t, some_N] = np.einsum("NS,SNH->NH", p_NS / p_NS.sum(1, keepdims=True), v[seen][:, some_N])
    return out, lse
