"""How much attention the last queries of a piece pay to each column and each diagonal, whatever computes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_jax.kernels.backends import Backend, alone, dispatch, on_gpu, on_tpu
from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.line_scores import reference
from qwen_jax.rope import Rotary

FORCED_COLUMNS = 30
FORCED_DIAGONALS = 100
LAST_QUERIES = 64

BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": on_gpu("qwen_jax.kernels.line_scores.mosaic_gpu", "attention_sums"),
    "mosaic_tpu": alone(on_tpu("qwen_jax.kernels.line_scores.mosaic_tpu", "attention_sums")),
    "xla": reference.attention_sums,
}


def line_scores(
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    *,
    layer: jax.Array | int,
    q_start: jax.Array | int,
    kv_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    last_queries: int = LAST_QUERIES,
    first: jax.Array | int | None = None,
    share: Share | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Column and diagonal sums of the attention of a piece's last real queries (`algorithms.md` 4.3).

    The piece of row b ends at e = min(q_start + T, kv_len_B[b]); its last min(last_queries, e - first) queries count. Their
    attention A is one softmax over all keys j <= i, at the rotary's critical positions. A column's score is the sum of A
    over rows, the score of the diagonal at distance d the sum of A[i, i - d].

    Args:
        q_BTNH: queries, not rotated, [B, T, N, H]; the real ones must not straddle a multiple of the chunk length s.
        k_LBKSH: keys as `kernels.attention.api.attend` takes them, [L, B, K, S, H]; query head n uses KV head n // (N / K).
        layer, q_start: int32 scalars, values, not shapes.
        kv_len_B: int32[B], tokens of each row that are real.
        rotary: positions, static.
        scale_B: float32[B], the factor on scores.
        last_queries: most queries that count, static.
        first: int32 scalar, the first query that is real; None: q_start.
        share: which positions are in the cache; None: slot and position are the same. The softmax is still over all keys: the
            devices meet over the share's axis.
        backend: a name in BACKENDS, or None for the first that accepts.

    Returns:
        (columns float32[B, N, S] by slot of key j, diagonals float32[B, N, positions] by distance d = i - j, of this device's
        keys: over several devices diagonals are to be added up). The first 30 columns and the 100 nearest diagonals
        are +inf, what lies at or beyond e is -inf. A row that has no real query in the piece is -inf throughout.

    Raises:
        NotImplementedError: the named backend, or every backend, refuses; the message holds the reasons.
        ValueError: no backend of that name, or last_queries below 1.
    """
    if last_queries < 1:
        raise ValueError(f"last_queries must be at least 1, got {last_queries}")
    T, S = q_BTNH.shape[1], k_LBKSH.shape[3]
    q_start = jnp.int32(q_start)
    first = q_start if first is None else jnp.int32(first)
    end_B = jnp.minimum(q_start + T, jnp.asarray(kv_len_B, jnp.int32))
    sums = dispatch(
        "line scores", BACKENDS, backend, q_BTNH, k_LBKSH,
        layer=jnp.int32(layer), q_start=q_start, end_B=end_B, rotary=rotary, scale_B=scale_B, last_queries=last_queries,
        **({} if share is None else {"first": first, "share": share}),
    )  # fmt: skip
    last_B11 = jnp.where(end_B > first, end_B, 0)[:, None, None]

    def forced(sums_BNS: jax.Array, lines_S: jax.Array, nearest: int) -> jax.Array:
        sums_BNS = jnp.where(lines_S < nearest, jnp.inf, sums_BNS)
        return jnp.where(lines_S < last_B11, sums_BNS, -jnp.inf)

    share = share or EVERYTHING
    slots, distances = jnp.arange(S, dtype=jnp.int32), jnp.arange(share.capacity(S), dtype=jnp.int32)
    return forced(sums[0], share.position(slots), FORCED_COLUMNS), forced(
        sums[1], distances, FORCED_DIAGONALS
    )
