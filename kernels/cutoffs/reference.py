"""Cutoffs in plain XLA: bisection on the bits of the scores."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.cutoffs.ranks import INFINITY, rank_of


def cutoffs(scores_XS: Sequence[jax.Array], count_AX: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `kernels.cutoffs.api.cutoffs`."""
    found = [
        _cutoffs(rank_of(x_XS), count_X[:, None]) for x_XS, count_X in zip(scores_XS, count_AX, strict=True)
    ]
    return jnp.stack([least_X for least_X, _ in found]), jnp.stack([last_X for _, last_X in found])


def _cutoffs(rank_XS: jax.Array, count_X1: jax.Array) -> tuple[jax.Array, jax.Array]:
    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        fits = (rank_XS > middle).sum(-1, keepdims=True, dtype=jnp.int32) <= count_X1
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    # The least rank above which no more than `count` lie; 31 passes halve [0, rank of +inf] to one.
    ends = jnp.zeros_like(count_X1), jnp.full_like(count_X1, INFINITY)
    least_X1 = lax.fori_loop(0, 31, halve, ends)[1]
    room_X1 = count_X1 - (rank_XS > least_X1).sum(-1, keepdims=True, dtype=jnp.int32)
    within_XS = jnp.cumsum(rank_XS == least_X1, -1, dtype=jnp.int32) <= room_X1  # of places: true, then false
    return least_X1[:, 0], within_XS.sum(-1, dtype=jnp.int32) - 1
