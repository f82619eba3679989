"""Line scores on TPUs: what the Mosaic TPU kernels serve, and what lies around them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.line_scores.last_queries import ROWS, last_queries_of
from qwen_jax.kernels.line_scores.tpu import Problem, line_sums, log_sum_exps
from qwen_jax.kernels.tpu import LANES, LOG2E, NOTHING_YET, as_it_lies, why_not_tpu
from qwen_jax.rope import Rotary

_BLOCK_KV = 1024


def attention_sums(
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    *,
    layer: jax.Array,
    q_start: jax.Array,
    end_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    last_queries: int,
    block_kv: int = _BLOCK_KV,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.line_scores.reference.attention_sums`. Keys must be finite.

    Args:
        block_kv: most keys a tile, a power of two.
        interpret: parameters of jax's TPU interpreter, to run without a TPU.

    Raises:
        NotImplementedError: not a TPU, or shapes and dtypes the kernels do not serve.
    """
    if not interpret and (reason := why_not_tpu()):
        raise NotImplementedError(reason)
    while block_kv > LANES and rotary.chunk_len and rotary.chunk_len % block_kv:
        block_kv //= 2
    if reason := refusal(q_BTNH, k_LBKSH, rotary, last_queries):
        raise NotImplementedError(reason)
    (B, _, N, H), (K, S) = q_BTNH.shape, k_LBKSH.shape[2:4]
    p = Problem(len(rotary.stages), B, N, K, S, H, block_kv)
    last = last_queries_of(
        q_BTNH, q_start=q_start, end_B=end_B, rotary=rotary, factor_B=scale_B.astype(jnp.float32) * LOG2E,
        last_queries=last_queries,
    )  # fmt: skip
    unused = p.rows - p.group * ROWS
    q_PBKRH = last.q[..., ::-1, :].reshape(p.versions, B, K, p.group * ROWS, H)
    q_PBKRH = jnp.pad(q_PBKRH, ((0, 0), (0, 0), (0, 0), (0, unused), (0, 0)))
    where = jnp.stack([layer, *(start // block_kv for start in rotary.stage_starts(q_start))])
    rows = jnp.stack([last.first, last.end], axis=1).reshape(-1)
    keys = as_it_lies(k_LBKSH)
    lse_BK1R = log_sum_exps(p, interpret)(where, rows, q_PBKRH, keys)
    counts_BR = jnp.pad(jnp.tile(last.real[:, ::-1], (1, p.group)), ((0, 0), (0, unused)))
    lse_BKR = jnp.where(counts_BR[:, None] & (lse_BK1R[:, :, 0] > NOTHING_YET), lse_BK1R[:, :, 0], jnp.inf)
    columns_BKGS, diagonals_BKMGX = line_sums(p, interpret)(where, rows, q_PBKRH, keys, lse_BKR[..., None])
    diagonals_BKGMX = jnp.swapaxes(diagonals_BKMGX, 2, 3)
    return columns_BKGS.reshape(B, N, -1)[..., :S], _by_distance(
        diagonals_BKGMX.reshape(B, N, p.tiles, -1), last.first, S
    )


def refusal(q_BTNH: jax.Array, k_LBKSH: jax.Array, rotary: Rotary, last_queries: int) -> str | None:
    """Why the kernels cannot serve these shapes and dtypes, or None."""
    if {q_BTNH.dtype, k_LBKSH.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return f"needs bfloat16 queries and keys, got {q_BTNH.dtype}, {k_LBKSH.dtype}"
    if k_LBKSH.shape[4] not in (64, 128):
        return f"needs a head dimension of 64 or 128, got {k_LBKSH.shape[4]}"
    if last_queries > ROWS:
        return f"needs at most {ROWS} last queries, got {last_queries}"
    if rotary.chunk_len and rotary.chunk_len % LANES:
        return f"needs a dual chunk length that is a multiple of {LANES}, got {rotary.chunk_len}"
    return None


def _by_distance(diagonals_BNMX: jax.Array, first_B: jax.Array, capacity: int) -> jax.Array:
    """The sums of every tile of keys, by diagonal within the tile, as sums by distance, float32[B, N, S].

    Entry x of tile m holds distance first + (ROWS - 1) - (m * block_kv + x): laid end to end, the entries run over all
    distances downwards. The last LANES entries of a tile meet the first ones of the next.
    """
    B, N, M, X = diagonals_BNMX.shape
    width = X - LANES
    own, over = diagonals_BNMX[..., :width], diagonals_BNMX[..., width:]
    own = jnp.pad(own, ((0, 0), (0, 0), (0, 1), (0, 0)))
    over = jnp.pad(over, ((0, 0), (0, 0), (1, 0), (0, width - LANES)))
    falling = (own + over).reshape(B, N, (M + 1) * width)
    # Reversed, distance d stands at d + len - 1 - (first + ROWS - 1).
    rising = jnp.pad(falling[..., ::-1], ((0, 0), (0, 0), (0, capacity)))
    at_B = (M + 1) * width - ROWS - first_B
    return jax.vmap(lambda x_NS, at: lax.dynamic_slice_in_dim(x_NS, at, capacity, 1))(rising, at_B)
