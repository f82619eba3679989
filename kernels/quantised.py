"""8-bit caches: vectors are mixed (`kernels.mixing`), then held as int8 or float8_e4m3fn, one float32 factor a token and head.

The factor is fitted to the largest number, which mixing keeps near the others. What comes of such values is unmixed.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.mixing import mix_keys, unmix

DTYPES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))


def quantise(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """x [..., H] as (8-bit numbers [..., H], float32 factors [...]): their product is `mix_keys` of x."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    limit = float(jnp.finfo(dtype).max if floating else jnp.iinfo(dtype).max)
    x = mix_keys(x.astype(jnp.float32), jnp.float32, parts=jnp.bfloat16)
    factor = jnp.max(jnp.abs(x), axis=-1) / limit
    scaled = x / jnp.where(factor > 0, factor, 1.0)[..., None]
    return (scaled if floating else jnp.round(scaled)).astype(dtype), factor


def expand(numbers: jax.Array, factor: jax.Array, dtype: Any) -> jax.Array:
    """What `quantise` was given, as well as 8 bits hold it: [..., H] in `dtype`."""
    return (unmix(numbers.astype(jnp.float32)) * factor[..., None]).astype(dtype)


def read_mixed(x_LBKSH: jax.Array, scale_LBKS: jax.Array, layer: jax.Array | int, dtype: Any) -> jax.Array:
    """One layer of an 8-bit cache in `dtype`, [1, B, K, S, H], mixed as it lies.

    Unmixing every key and value would cost more than mixing the queries of a piece and unmixing its results, and accuracy.
    """
    numbers, scale = (lax.dynamic_index_in_dim(x, layer) for x in (x_LBKSH, scale_LBKS))
    return (numbers.astype(jnp.float32) * scale[..., None]).astype(dtype)
