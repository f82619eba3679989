"""8-bit caches: numbers of int8 or float8_e4m3fn with one float32 factor a token and head."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.backends import Backend

DTYPES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))


def quantise(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """x [..., H] as (8-bit numbers [..., H], float32 factors [...]): the largest magnitude of each vector fills the range."""
    limit = (
        float(jnp.finfo(dtype).max) if jnp.issubdtype(dtype, jnp.floating) else float(jnp.iinfo(dtype).max)
    )
    x = x.astype(jnp.float32)
    factor = jnp.max(jnp.abs(x), axis=-1) / limit
    scaled = x / jnp.where(factor > 0, factor, 1.0)[..., None]
    return (scaled if jnp.issubdtype(dtype, jnp.floating) else jnp.round(scaled)).astype(dtype), factor


def expand_layer(x_LBKSH: jax.Array, scale_LBKS: jax.Array, layer: jax.Array | int, dtype: Any) -> jax.Array:
    """One layer of an 8-bit cache in `dtype`, [1, B, K, S, H]."""
    x, scale = (lax.dynamic_index_in_dim(part, layer) for part in (x_LBKSH, scale_LBKS))
    return (x.astype(jnp.float32) * scale[..., None]).astype(dtype)


def expanding(attend: Backend) -> Backend:
    """`attend` for 8-bit caches too: the layer is expanded to the queries' dtype, in scratch, before the call."""

    @functools.wraps(attend)
    def call(
        q: jax.Array,
        k_LBKSH: jax.Array,
        v_LBKSH: jax.Array,
        *,
        layer: jax.Array | int,
        k_scale_LBKS: jax.Array | None = None,
        v_scale_LBKS: jax.Array | None = None,
        **rest: Any,
    ) -> tuple[jax.Array, jax.Array]:
        if k_scale_LBKS is None or v_scale_LBKS is None:
            return attend(q, k_LBKSH, v_LBKSH, layer=layer, **rest)
        k = expand_layer(k_LBKSH, k_scale_LBKS, layer, q.dtype)
        v = expand_layer(v_LBKSH, v_scale_LBKS, layer, q.dtype)
        return attend(q, k, v, layer=0, **rest)

    return call
