"""Scores as integers of the same order: a threshold is found among integers, bit by bit."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

INFINITY = int(np.float32(np.inf).view(np.int32))  # the rank of +inf


class Heavy(NamedTuple):
    """Scores from place `first` of a row on count as `weight` scores each, all before as one."""

    first: int
    weight: int


def rank_of(scores: jax.Array) -> jax.Array:
    """int32 in the order of the scores, float32 from 0 up; -1 for -inf."""
    # The bits of floats from 0 up are ordered like the floats.
    return jnp.where(scores >= 0, lax.bitcast_convert_type(jnp.abs(scores), jnp.int32), -1)
