"""Mixed rotations in plain XLA: the definition, and the fallback."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.kernels.mixing import mix

TILE = 4096  # positions at once: what the product takes is twice as large as what it makes


def mixed_rotations(
    q_BTNH: jax.Array, cos_PBTJ: jax.Array, sin_PBTJ: jax.Array, *, dtype: np.dtype
) -> jax.Array:
    """See `kernels.rotations.api.mixed_rotations`. Any shapes, any device."""

    def rotations(q_BTNH: jax.Array, cos_PBTJ: jax.Array, sin_PBTJ: jax.Array) -> jax.Array:
        cos, sin = cos_PBTJ[..., None, :], sin_PBTJ[..., None, :]
        a, b = jnp.split(q_BTNH.astype(jnp.float32), 2, axis=-1)
        return mix(jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1), dtype)

    T = q_BTNH.shape[1]
    if T <= TILE:
        return rotations(q_BTNH, cos_PBTJ, sin_PBTJ)

    def tile(n: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(n * TILE, T - TILE)
        q = lax.dynamic_slice_in_dim(q_BTNH, start, TILE, 1)
        cos, sin = (lax.dynamic_slice_in_dim(x, start, TILE, 2) for x in (cos_PBTJ, sin_PBTJ))
        return lax.dynamic_update_slice_in_dim(out, rotations(q, cos, sin), start, 2)

    out = lax.empty((len(cos_PBTJ), *q_BTNH.shape), dtype)
    return lax.fori_loop(0, -(-T // TILE), tile, out)
