"""The last queries of a piece, as the kernels of line scores take them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qwen_jax.rope import Rotary

ROWS = 64  # queries a head, whether or not so many count


class LastQueries(NamedTuple):
    """The ROWS queries that end where a row's piece does, or the piece's first ones where fewer are real.

    Attributes:
        first: int32[B], the position of the first of them.
        end: int32[B], keys that they see, 0 for a row without a real query.
        real: bool[B, ROWS], which of them count.
        q: [stages, B, N, ROWS, H], as each stage's keys see them at critical positions, stages in key order, scaled so that
            q . k is a base-2 exponent.
    """

    first: jax.Array
    end: jax.Array
    real: jax.Array
    q: jax.Array


def last_queries_of(
    q_BTNH: jax.Array,
    *,
    q_start: jax.Array,
    end_B: jax.Array,
    rotary: Rotary,
    factor_B: jax.Array,
    last_queries: int,
    first: jax.Array | int | None = None,
    dtype: DTypeLike | None = None,
) -> LastQueries:
    """Arguments as in `reference.attention_sums`, `first` by default q_start; factor_B float32[B] is that on scores, as
    exponents of base 2; dtype that of the keys, by default q's."""
    T = q_BTNH.shape[1]
    first = q_start if first is None else first
    first_B = jnp.clip(end_B - q_start - ROWS, 0, max(T - ROWS, 0))
    i_BR = (q_start + first_B)[:, None] + jnp.arange(ROWS, dtype=jnp.int32)
    real_BR = (i_BR < end_B[:, None]) & (i_BR >= jnp.maximum(end_B - last_queries, first)[:, None])
    q_BTNH = jnp.pad(q_BTNH, ((0, 0), (0, max(ROWS - T, 0)), (0, 0), (0, 0)))
    q_BRNH = jax.vmap(lambda q_TNH, first: lax.dynamic_slice_in_dim(q_TNH, first, ROWS))(q_BTNH, first_B)
    q_PBRNH = rotary.query_stages(q_BRNH, i_BR, scale_B=factor_B, critical=True, dtype=dtype)
    end_B = jnp.where(end_B > first, end_B, 0)
    return LastQueries(i_BR[:, 0], end_B, real_BR, jnp.swapaxes(q_PBRNH, 2, 3))
