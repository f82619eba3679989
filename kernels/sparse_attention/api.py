"""Prefill attention over chosen lines: the queries of one piece against some columns and some bands of the cache.

Backends are tried in order, as in `kernels.attention.api`, and all compute the same set of keys.
"""

from __future__ import annotations

import jax

from qwen_jax.kernels.backends import Backend, alone, dispatch, given, on_gpu, on_tpu
from qwen_jax.kernels.blocks import Share
from qwen_jax.kernels.sparse_attention import reference
from qwen_jax.kernels.sparse_attention.bands import BAND
from qwen_jax.rope import Rotary

BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": on_gpu("qwen_jax.kernels.sparse_attention.mosaic_gpu", "attend_lines"),
    "mosaic_tpu": alone(on_tpu("qwen_jax.kernels.sparse_attention.mosaic_tpu", "attend_lines")),
    "xla": reference.attend_lines,
}


def attend_lines(
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    *,
    columns_BNS: jax.Array,
    bands_BNM: jax.Array,
    most_columns: int,
    layer: jax.Array | int,
    q_start: jax.Array | int,
    kv_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    band: int = BAND,
    share: Share | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention as `kernels.attention.api.attend`, over exactly the keys of some columns and bands.

    Query i of row b, head n, computes key j iff j <= i, j < kv_len_B[b], and one of: columns_BNS[b, n, j]; the tile
    distance D = i // band - j // band is 0; bands_BNM[b, n, D]. `bands.bands_of` gives the bands that hold chosen diagonals.
    The queries must not straddle a multiple of the rotary's chunk length s.

    Args:
        q_BTNH: queries, not rotated, [B, T, N, H].
        k_LBKSH, v_LBKSH: keys and values as `attend` takes them, [L, B, K, S, H].
        columns_BNS: bool[B, N, S], by slot of the key.
        bands_BNM: bool[B, N, M], by tile distance; M = ceil(positions / band).
        most_columns: no head has more columns than this, static; columns beyond it would be left out.
        layer, q_start: int32 scalars, values, not shapes.
        kv_len_B: int32[B], tokens of each row that are real.
        rotary: positions, static.
        scale_B: float32[B], the factor on scores.
        band: positions a tile, static.
        share: which positions are in the cache, S of its slots; None: slot and position are the same.
        backend: a name in BACKENDS, or None for the first that accepts.

    Returns:
        (out [B, T, N, H] in q's dtype, lse float32[B, T, N], natural log). Queries past the end of their row
        may give anything finite, and -inf.

    Raises:
        NotImplementedError: the named backend, or every backend, refuses; the message holds the reasons.
        ValueError: no backend of that name.
    """
    return dispatch(
        "sparse attention", BACKENDS, backend, q_BTNH, k_LBKSH, v_LBKSH,
        columns_BNS=columns_BNS, bands_BNM=bands_BNM, most_columns=most_columns, layer=layer, q_start=q_start,
        kv_len_B=kv_len_B, rotary=rotary, scale_B=scale_B, band=band, **given(share=share),
    )  # fmt: skip
