"""8-bit caches: vectors are mixed, then held as int8 or float8_e4m3fn with one float32 factor a token and head.

Mixing is a fixed orthogonal map of the H channels: signs, then a Hadamard transform. It leaves every product of a query and a
key as it was if both are mixed, and spreads a channel that is far larger than the others, to which the factor would be fitted
alone, over all of them (QuaRot, arXiv 2404.00456). Keys are mixed after their rotation; so are the queries that meet them,
and what comes of such values is unmixed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.kernels.products import einsum

DTYPES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))


def mix(x: jax.Array) -> jax.Array:
    """x [..., H] mixed, float32."""
    matrix, factor = _mixing(x.shape[-1])
    return einsum("...H,HJ->...J", x, jnp.asarray(matrix, x.dtype)) * factor


def unmix(x: jax.Array) -> jax.Array:
    """The inverse of `mix`: [..., H], float32."""
    matrix, factor = _mixing(x.shape[-1])
    return einsum("...J,HJ->...H", x, jnp.asarray(matrix, x.dtype)) * factor


def mix_queries(q: jax.Array, dtype: Any) -> jax.Array:
    """float32 queries [..., H] that meet the keys of `read_mixed`: the sums and differences of `mix`, not scaled, in `dtype`.

    Of a 16-bit dtype the product takes each query as two numbers, what rounding leaves and the rest: rounded before, a channel
    that makes most of a score would lose what mixing is to keep.
    """
    signs = jnp.asarray(_mixing(q.shape[-1])[0], dtype)
    if jnp.dtype(dtype).itemsize == 2:
        bits = jnp.finfo(dtype)
        high = lax.reduce_precision(q, bits.nexp, bits.nmant)  # XLA may drop a conversion to and fro
        q, signs = jnp.concatenate([high, q - high], axis=-1), jnp.concatenate([signs, signs])
    return _rounded_once("...H,HJ->...J", q.astype(dtype), signs)


def unmix_outputs(out: jax.Array) -> jax.Array:
    """Means [..., H] of the values of `read_mixed` as means of what was quantised, in out's dtype."""
    signs = jnp.asarray(_mixing(out.shape[-1])[0], out.dtype)
    return _rounded_once("...J,HJ->...H", out, signs)


def _rounded_once(spec: str, x: jax.Array, signs: jax.Array) -> jax.Array:
    """The sums in x's dtype as they leave the product: in float32 they would be prefill's largest array."""
    return jnp.einsum(spec, x, signs, precision=lax.Precision.HIGHEST, preferred_element_type=x.dtype)


@functools.cache
def _mixing(head_dim: int) -> tuple[np.ndarray, float]:
    """Entries 1, -1 and 0, exact in any dtype, and the factor that makes the matrix orthogonal."""
    size = head_dim & -head_dim  # the largest power of two that divides H
    hadamard = np.ones((1, 1))
    while len(hadamard) < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    # Without signs equal channels would add up in one. Legendre symbols mod 257 look random and are the same for ever,
    # as caches on disk need.
    signs = np.array([1 if pow(h % 256 + 1, 128, 257) == 1 else -1 for h in range(head_dim)])
    return signs[:, None] * np.kron(np.eye(head_dim // size), hadamard), size**-0.5


def quantise(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """x [..., H] as (8-bit numbers [..., H], float32 factors [...]): mixed, the largest magnitude fills the range."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    limit = float(jnp.finfo(dtype).max if floating else jnp.iinfo(dtype).max)
    x = mix(x)
    factor = jnp.max(jnp.abs(x), axis=-1) / limit
    scaled = x / jnp.where(factor > 0, factor, 1.0)[..., None]
    return (scaled if floating else jnp.round(scaled)).astype(dtype), factor


def expand(numbers: jax.Array, factor: jax.Array, dtype: Any) -> jax.Array:
    """What `quantise` was given, as well as 8 bits hold it: [..., H] in `dtype`."""
    # All three dtypes of a model hold every 8-bit number exactly.
    return (unmix(numbers.astype(dtype)) * factor[..., None]).astype(dtype)


def read_mixed(x_LBKSH: jax.Array, scale_LBKS: jax.Array, layer: jax.Array | int, dtype: Any) -> jax.Array:
    """One layer of an 8-bit cache in `dtype`, [1, B, K, S, H]: mixed, times the factor that mixing has.

    Unmixing every key and value would cost more than mixing the queries of a piece and unmixing its results. It would also cost
    accuracy: a channel that makes most of a score is spread over all channels, whose roundings cancel.
    """
    _, factor = _mixing(x_LBKSH.shape[-1])
    numbers, scale = (lax.dynamic_index_in_dim(x, layer) for x in (x_LBKSH, scale_LBKS))
    return (numbers.astype(jnp.float32) * (scale * factor)[..., None]).astype(dtype)
