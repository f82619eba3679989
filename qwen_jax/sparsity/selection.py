"""Which lines a head keeps: the best columns and diagonals within its budget, found without sorting."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INFINITY = int(np.float32(np.inf).view(np.int32))  # the rank of +inf


class Lines(NamedTuple):
    """The chosen lines of every head: key j is kept for query i >= j iff columns[j] or diagonals[i - j].

    columns, diagonals: bool[B, N, S], by key position and by distance.
    """

    columns: jax.Array
    diagonals: jax.Array


def select_lines(
    columns_BNS: jax.Array, diagonals_BNS: jax.Array, vertical_N: jax.Array, slash_N: jax.Array
) -> Lines:
    """The best lines of every head by their scores (`kernels.line_scores`), at most as many as its budget allows.

    Args:
        columns_BNS, diagonals_BNS: float32[B, N, S] scores, none between -inf and 0; -inf is never chosen.
        vertical_N, slash_N: int32[N], lines to keep; more than there are keeps all. They are read, never changed.
    """
    return Lines(best(columns_BNS, vertical_N[:, None]), best(diagonals_BNS, slash_N[:, None]))


def best(scores: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` largest scores along the last axis, bool like `scores`; of those that tie for the last place the first.

    Args:
        scores: float32[..., S]: -inf, which is never chosen, or from 0 to +inf.
        count: int32, broadcast to scores' shape with one entry in its last axis.
    """
    rank = rank_of(scores)
    count = jnp.broadcast_to(count, (*scores.shape[:-1], 1))

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        fits = (rank > middle).sum(-1, keepdims=True) <= count
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    # The least threshold above which no more than `count` lie; 31 passes halve [-1, bits of +inf] to one.
    ends = jnp.full(count.shape, -1, jnp.int32), jnp.full(count.shape, INFINITY, jnp.int32)
    threshold = lax.fori_loop(0, 31, halve, ends)[1]
    above, tied = rank > threshold, (rank == threshold) & (rank >= 0)
    room = count - above.sum(-1, keepdims=True)
    return above | (tied & (jnp.cumsum(tied, -1) <= room))


def rank_of(scores: jax.Array) -> jax.Array:
    """int32 in the order of the scores, float32 from 0 up; -1 for -inf. A threshold is found by bisection on integers."""
    # The bits of floats from 0 up are ordered like the floats.
    return jnp.where(scores >= 0, lax.bitcast_convert_type(jnp.abs(scores), jnp.int32), -1)
