"""Line scores in plain XLA: the definition other backends are tested against, and the fallback.

Two walks over the key tiles: the first finds each row's log-sum-exp, the second adds the columns of every tile and its
diagonals, which a skew turns into columns. No array is larger than the last queries times a key tile times the heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.blocks import EVERYTHING, Share
from qwen_jax.kernels.products import einsum
from qwen_jax.rope import Rotary, Stage

KEY_TILE = 1024


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
    first: jax.Array | int = 0,
    share: Share = EVERYTHING,
) -> tuple[jax.Array, jax.Array]:
    """Sums of attention by column and by diagonal, float32[B, N, S] each; see `kernels.line_scores.api.line_scores`.

    Rows of the batch run one after another: their pieces end at different places, `end_B` int32[B].
    """

    def one(b: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _one_row(
            lax.dynamic_index_in_dim(q_BTNH, b, keepdims=False), k_LBKSH, b, layer, q_start, end_B[b], rotary, scale_B[b],
            last_queries, first, share,
        )  # fmt: skip

    return lax.map(one, jnp.arange(len(q_BTNH), dtype=jnp.int32))


def _one_row(
    q_TNH: jax.Array,
    k_LBKSH: jax.Array,
    b: jax.Array,
    layer: jax.Array,
    q_start: jax.Array,
    end: jax.Array,
    rotary: Rotary,
    scale: jax.Array,
    last_queries: int,
    first: jax.Array | int,
    share: Share,
) -> tuple[jax.Array, jax.Array]:
    T, N, H = q_TNH.shape
    K, S = k_LBKSH.shape[2:4]
    R, width = min(last_queries, T), min(KEY_TILE, S, share.blocks.size)  # a tile's positions are consecutive
    # The R rows that end at `end`, or the first R where fewer are real: those past `end` then count nothing.
    first_row = jnp.maximum(end - q_start - R, 0)
    i_R = q_start + first_row + jnp.arange(R, dtype=jnp.int32)
    q_RNH = lax.dynamic_slice(q_TNH, (first_row, 0, 0), (R, N, H))
    real_R1 = ((i_R >= first) & (i_R < end))[:, None]

    def seen_by(stage: Stage) -> jax.Array:
        q = rotary.rotate_queries(q_RNH, i_R, stage, critical=True, dtype=k_LBKSH.dtype)
        return jnp.swapaxes(q, 0, 1).reshape(K, N // K * R, H)

    q_stages = {stage: seen_by(stage) for stage in rotary.stages}

    def walk(step: Callable[[jax.Array, jax.Array, Any], Any], state: Any) -> Any:
        """Folds `step(first slot of the tile, scores [N, R, width], state)` over the tiles of all stages."""
        for stage, bounds in rotary.stage_ranges(q_start, end).items():
            lo, hi = (jnp.minimum(share.below(bound), S) for bound in bounds)

            def visit(
                n: jax.Array, state: Any, stage: Stage = stage, lo: jax.Array = lo, hi: jax.Array = hi
            ) -> Any:
                wanted = lo + n * width
                start = jnp.minimum(
                    wanted, S - width
                )  # dynamic_slice would move a tile that overhangs the cache
                slot_S = start + jnp.arange(width, dtype=jnp.int32)
                j_S = share.position(slot_S)
                k_KSH = lax.dynamic_slice(k_LBKSH, (layer, b, 0, start, 0), (1, 1, K, width, H))[0, 0]
                s_NRS = einsum("KRH,KSH->KRS", q_stages[stage], k_KSH).reshape(N, R, width) * scale
                visible_RS = (slot_S >= wanted) & (slot_S < hi) & (j_S <= i_R[:, None]) & real_R1
                return step(start, jnp.where(visible_RS, s_NRS, -jnp.inf), state)

            state = lax.fori_loop(0, -(-jnp.maximum(hi - lo, 0) // width), visit, state)
        return state

    def normalise(start: jax.Array, s_NRS: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
        peak_NR, total_NR = state
        new_NR = jnp.maximum(peak_NR, s_NRS.max(-1))
        base_NR = jnp.where(jnp.isneginf(new_NR), 0.0, new_NR)
        total_NR = total_NR * jnp.exp(peak_NR - base_NR) + jnp.exp(s_NRS - base_NR[..., None]).sum(-1)
        return new_NR, total_NR

    peak_NR, total_NR = walk(normalise, (jnp.full((N, R), -jnp.inf), jnp.zeros((N, R))))
    if share.axis is not None:
        all_NR = lax.pmax(peak_NR, share.axis)
        shrink_NR = jnp.exp(peak_NR - jnp.where(jnp.isneginf(all_NR), 0.0, all_NR))
        peak_NR, total_NR = all_NR, lax.psum(total_NR * shrink_NR, share.axis)
    lse_NR = jnp.where(total_NR > 0, peak_NR + jnp.log(total_NR), jnp.inf)

    def add(start: jax.Array, s_NRS: jax.Array, state: tuple[jax.Array, jax.Array]) -> Any:
        columns_NS, diagonals_NS = state
        p_NRS = jnp.exp(s_NRS - lse_NR[..., None])
        # Entry d lies at distance i_R[0] - j - (width - 1) + d, j the tile's first key; the buffer starts at -(width + R).
        at = i_R[0] - share.position(start) - (width - 1) + width + R
        return _add_at(columns_NS, p_NRS.sum(1), start), _add_at(diagonals_NS, _diagonal_sums(p_NRS), at)

    distances = share.capacity(S)
    zeros = jnp.zeros((N, S)), jnp.zeros((N, distances + 2 * (width + R)))
    columns_NS, diagonals_NS = walk(add, zeros)
    return columns_NS, diagonals_NS[:, width + R :][:, :distances]


def _diagonal_sums(p_NRS: jax.Array) -> jax.Array:
    """[N, R + S - 1]: entry d sums p[r, w] with r + (S - 1 - w) = d.

    A row padded by R zeros and re-read at a length one shorter moves right by one more than the row above it.
    """
    N, R, S = p_NRS.shape
    padded = jnp.pad(p_NRS[..., ::-1], ((0, 0), (0, 0), (0, R))).reshape(N, R * (S + R))
    return padded[:, : R * (S + R - 1)].reshape(N, R, S + R - 1).sum(1)


def _add_at(total_NS: jax.Array, x_NS: jax.Array, start: jax.Array) -> jax.Array:
    old = lax.dynamic_slice(total_NS, (0, start), x_NS.shape)
    return lax.dynamic_update_slice(total_NS, old + x_NS, (0, start))
