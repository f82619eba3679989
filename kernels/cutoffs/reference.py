"""Cutoffs in plain XLA: bisection on the bits of the scores."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.cutoffs.ranks import INFINITY, Heavy, rank_of


def cutoffs(
    scores_XS: Sequence[jax.Array], count_AX: jax.Array, heavy: Heavy | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.cutoffs.api.cutoffs`."""
    weight_S: jax.Array | int = 1
    if heavy:
        places_S = jnp.arange(scores_XS[0].shape[-1], dtype=jnp.int32)
        weight_S = jnp.where(places_S < heavy.first, 1, heavy.weight)
    found = [
        _cutoffs(rank_of(x_XS), count_X[:, None], weight_S)
        for x_XS, count_X in zip(scores_XS, count_AX, strict=True)
    ]
    return jnp.stack([least_X for least_X, _ in found]), jnp.stack([last_X for _, last_X in found])


def _cutoffs(
    rank_XS: jax.Array, count_X1: jax.Array, weight_S: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    def weighed(chosen_XS: jax.Array) -> jax.Array:
        return (chosen_XS * weight_S).sum(-1, keepdims=True, dtype=jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        # Below the count: of what reaches it exactly the least is the cut, as all of it is kept.
        fits = weighed(rank_XS > middle) < count_X1
        return jnp.where(fits, low, middle + 1), jnp.where(fits, middle, high)

    # The least rank above which less than `count` lies; 31 passes halve [0, rank of +inf] to one.
    ends = jnp.zeros_like(count_X1), jnp.full_like(count_X1, INFINITY)
    least_X1 = lax.fori_loop(0, 31, halve, ends)[1]
    room_X1 = count_X1 - weighed(rank_XS > least_X1)
    ties_XS = (rank_XS == least_X1) * weight_S
    within_XS = jnp.cumsum(ties_XS, -1, dtype=jnp.int32) - ties_XS < room_X1  # of places: true, then false
    nothing_X = count_X1[:, 0] < 1
    return (
        jnp.where(nothing_X, jnp.iinfo(jnp.int32).max, least_X1[:, 0]),
        jnp.where(nothing_X, -1, within_XS.sum(-1, dtype=jnp.int32) - 1),
    )
