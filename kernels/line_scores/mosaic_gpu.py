"""Line scores on NVIDIA Hopper GPUs: what the Mosaic GPU kernels serve, and what lies around them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.hopper import KEY_DTYPES, LOG2E, why_not_hopper, why_not_shared
from qwen_jax.kernels.line_scores.hopper import Problem, Tiling, line_sums, log_sum_exps
from qwen_jax.kernels.line_scores.hopper_sums import TILE
from qwen_jax.kernels.line_scores.last_queries import ROWS, last_queries_of
from qwen_jax.rope import Rotary


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
    first: jax.Array | int | None = None,
    share: Share | None = None,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.line_scores.reference.attention_sums`. Keys must be finite up to the end of a tile of 128.

    Args:
        tiling: sizes of the kernels; None for the tuned ones.
        interpret: parameters of jax's GPU interpreter, to run without a GPU.

    Raises:
        NotImplementedError: not a Hopper GPU, or shapes and dtypes the kernels do not serve.
    """
    if not interpret and (reason := why_not_hopper()):
        raise NotImplementedError(reason)
    tiling = tiling or Tiling()
    if reason := refusal(q_BTNH, k_LBKSH, rotary, last_queries, tiling):
        raise NotImplementedError(reason)
    if reason := why_not_shared(share, max(tiling.first_keys, TILE)):
        raise NotImplementedError(reason)
    B, _, N, H = q_BTNH.shape
    K, S = k_LBKSH.shape[2:4]
    G = N // K
    held = share or EVERYTHING
    problem = Problem(3 if rotary.dca else 1, B, N, K, S, H, share.blocks if share else None)
    last = last_queries_of(
        q_BTNH, q_start=q_start, end_B=end_B, rotary=rotary, factor_B=scale_B.astype(jnp.float32) * LOG2E,
        last_queries=last_queries, first=first, dtype=k_LBKSH.dtype,
    )  # fmt: skip
    q = last.q.reshape(-1, G, ROWS, H)
    k = k_LBKSH.reshape(-1, S, H)
    where = jnp.stack([layer, *map(held.below, rotary.stage_starts(q_start)), jnp.int32(held.rank)])
    seen_B = held.below(last.end)
    rows = jnp.stack([last.first, seen_B], axis=1).reshape(-1)
    parts = log_sum_exps(problem, tiling, q.dtype, interpret)(where, rows, q, k)
    lse_BKGR = _log_sum_exp(parts.reshape(B, K, -1, G, ROWS), held.axis)
    lse_BKGR = jnp.where(last.real[:, None, None], lse_BKGR, jnp.inf)
    columns, diagonals = line_sums(problem, tiling, q.dtype, interpret)(
        where, rows, q, k, lse_BKGR.reshape(-1, G, ROWS)
    )
    return columns.reshape(B, N, -1)[..., :S], _by_distance(
        diagonals.reshape(B, N, -1, 2 * ROWS), last.first, seen_B, held.capacity(S), share
    )


def refusal(
    q_BTNH: jax.Array, k_LBKSH: jax.Array, rotary: Rotary, last_queries: int, tiling: Tiling
) -> str | None:
    """Why the kernels cannot serve these shapes and dtypes, or None."""
    K, capacity, head_dim = k_LBKSH.shape[2:]
    if q_BTNH.dtype != jnp.bfloat16 or k_LBKSH.dtype not in KEY_DTYPES:
        return f"needs bfloat16 queries and keys of bfloat16 or float16, got {q_BTNH.dtype}, {k_LBKSH.dtype}"
    if head_dim not in (64, 128):
        return f"needs a head dimension of 64 or 128, got {head_dim}"
    if last_queries > ROWS:
        return f"needs at most {ROWS} last queries, got {last_queries}"
    if q_BTNH.shape[2] // K * head_dim > 8 * 128:
        return f"needs at most {8 * 128 // head_dim} query heads a KV head, got {q_BTNH.shape[2] // K}"
    if capacity % 8:
        return f"needs a cache capacity that is a multiple of 8, got {capacity}"
    if rotary.chunk_len and rotary.chunk_len % tiling.first_keys:
        return f"needs a dual chunk length that is a multiple of {tiling.first_keys}, got {rotary.chunk_len}"
    return None


def _log_sum_exp(parts_BKPGR: jax.Array, axis: str | None) -> jax.Array:
    """Base 2, of the keys of all P ranges, and of all devices of a mesh axis; +inf for a query that sees none of them."""
    peak_BKGR = parts_BKPGR.max(2)
    if axis is not None:
        peak_BKGR = lax.pmax(peak_BKGR, axis)
    seen_BKGR = peak_BKGR > -jnp.inf
    total_BKGR = jnp.exp2(parts_BKPGR - jnp.where(seen_BKGR, peak_BKGR, 0.0)[:, :, None]).sum(2)
    if axis is not None:
        total_BKGR = lax.psum(total_BKGR, axis)
    return jnp.where(seen_BKGR, peak_BKGR + jnp.log2(total_BKGR), jnp.inf)


def _by_distance(
    diagonals_BNMX: jax.Array, i_B: jax.Array, seen_B: jax.Array, capacity: int, share: Share | None = None
) -> jax.Array:
    """The sums of every tile of keys, by diagonal within the tile, as sums by distance, float32[B, N, capacity].

    Entry x < ROWS of tile m holds distance i - ROWS m + (ROWS - 1 - x), the upper half the same less ROWS: laid end to end, the
    lower halves run over all distances downwards, and so do the upper ones, a tile later. Tiles of a share are laid where their
    positions lie, among zeros.
    """
    B, N, M, _ = diagonals_BNMX.shape
    there_BNM1 = (jnp.arange(M) < (seen_B[:, None] + (TILE - 1)) // TILE)[:, None, :, None]

    def laid(half_BNMR: jax.Array) -> jax.Array:
        half_BNMR = jnp.where(there_BNM1, half_BNMR, 0.0)
        if share is None:
            return half_BNMR.reshape(B, N, M * ROWS)
        each, count = share.blocks.size // TILE, share.blocks.count
        blocks = -(-M // each)
        half_BNMR = jnp.pad(half_BNMR, ((0, 0), (0, 0), (0, blocks * each - M), (0, 0)))
        here = (jnp.arange(count) == share.rank)[:, None]
        mine = half_BNMR.reshape(B, N, blocks, 1, share.blocks.size)
        return jnp.where(here, mine, 0.0).reshape(B, N, blocks * share.blocks.round)

    near, far = map(laid, jnp.split(diagonals_BNMX, 2, axis=-1))
    # One tile more: the last diagonals of a piece that ends within a tile.
    near, far = jnp.pad(near, ((0, 0), (0, 0), (0, 2 * ROWS))), jnp.pad(far, ((0, 0), (0, 0), (ROWS, ROWS)))
    at_BS = i_B[:, None] + (ROWS - 1) - jnp.arange(capacity, dtype=jnp.int32)
    return jnp.take_along_axis(near + far, jnp.maximum(at_BS, 0)[:, None], axis=-1)
