"""Which lines a head keeps: the best columns and diagonals within its budget, found without sorting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qwen_jax.kernels.cutoffs.api import cutoffs
from qwen_jax.kernels.cutoffs.ranks import Heavy, rank_of


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
    shape = columns_BNS.shape[:2]
    budgets = jnp.broadcast_to(vertical_N, shape), jnp.broadcast_to(slash_N, shape)
    return Lines(*_best((columns_BNS, diagonals_BNS), budgets))


def best(scores: jax.Array, count: jax.Array, heavy: Heavy | None = None) -> jax.Array:
    """The `count` largest scores along the last axis, bool like `scores`; of those that tie for the last place the first.

    Args:
        scores: float32[..., S]: -inf, which is never chosen, or from 0 to +inf.
        count: int32, broadcast to scores' shape without its last axis.
        heavy: scores that weigh more than one: the largest are then chosen that weigh `count` or more together.
    """
    return _best((scores,), (jnp.broadcast_to(count, scores.shape[:-1]),), heavy)[0]


def _best(
    scores: Sequence[jax.Array], counts: Sequence[jax.Array], heavy: Heavy | None = None
) -> list[jax.Array]:
    """`best` of several arrays of one shape, found in one go."""
    *rows, S = scores[0].shape
    count_AX = jnp.stack([count.reshape(-1) for count in counts]).astype(jnp.int32)
    cuts = cutoffs([x.reshape(-1, S) for x in scores], count_AX, heavy)
    place_S = jnp.arange(S, dtype=jnp.int32)
    chosen = []
    for x, *cut in zip(scores, *cuts, strict=True):
        rank, (least, last) = rank_of(x), (y.reshape(*rows, 1) for y in cut)
        chosen.append((rank > least) | ((rank == least) & (place_S <= last)))
    return chosen
