"""Mixing: a fixed orthogonal map of the H channels, signs and then a Hadamard transform, up to a factor.

It leaves every product of a query and a key as it was if both are mixed, and spreads a channel that is far larger than the
others over all of them (QuaRot, arXiv 2404.00456). Qwen2.5 has such channels: biases of keys, and the queries that meet the
keys of an attention sink, whose one product makes most of a score. Spread, their roundings cancel; and numbers of 8 bits are
fitted to all channels, not to the loudest. Keys are mixed after their rotation; so are the queries that meet them.

Queries are mixed by entries of 1 and -1, keys by the same over a power of two: nothing but sums is rounded.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def mix(x: jax.Array, dtype: Any, *, out: Any = None) -> jax.Array:
    """x float32[..., H] times `signs`, in `out`, by default `dtype`, rounded once; queries as they meet the keys of `mix_keys`.

    Of a `dtype` of fewer than 32 bits the product takes each number as two, what rounding leaves and the rest: rounded
    before, a channel that makes most of a score would lose what mixing is to keep.
    """
    matrix, out = signs(x.shape[-1]), dtype if out is None else out
    if jnp.dtype(dtype).itemsize >= 4:
        return _product("...H,HJ->...J", x, jnp.asarray(matrix, x.dtype), out)
    two = jnp.concatenate(in_two(x, dtype), axis=-1)
    return _product("...H,HJ->...J", two, jnp.asarray(np.concatenate([matrix, matrix]), two.dtype), out)


def in_two(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """float32 as the sum of two numbers of a 16-bit dtype."""
    bits = jnp.finfo(dtype)
    high = lax.reduce_precision(x, bits.nexp, bits.nmant)  # XLA may drop a conversion to and fro
    return high.astype(dtype), (x - high).astype(dtype)


def mix_keys(k: jax.Array, dtype: Any, *, out: Any = None) -> jax.Array:
    """As `mix`, over the power of two by which that lengthens: the products of queries and keys stay."""
    mixed = mix(k, dtype, out=out)
    return mixed * jnp.asarray(1 / block(k.shape[-1]), mixed.dtype)


def unmix(x: jax.Array) -> jax.Array:
    """What `mix_keys` was given, or means of it: [..., H] in x's dtype."""
    return _product("...J,HJ->...H", x, jnp.asarray(signs(x.shape[-1]), x.dtype), x.dtype)


def _product(spec: str, x: jax.Array, matrix: jax.Array, dtype: Any) -> jax.Array:
    """Sums as they leave the product in `dtype`: in float32 they would be prefill's largest array."""
    return jnp.einsum(spec, x, matrix, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


def block(head_dim: int) -> int:
    """How many channels are mixed with each other: the largest power of two that divides H."""
    return head_dim & -head_dim


@functools.cache
def signs(head_dim: int) -> np.ndarray:
    """The matrix, float64[H, H] of 1, -1 and 0, exact in any dtype; its rows are orthogonal and as long as sqrt(block(H))."""
    hadamard = np.ones((1, 1))
    while len(hadamard) < block(head_dim):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    # Without signs equal channels would add up in one. Legendre symbols mod 257 look random and are the same for ever,
    # as caches on disk need.
    each = np.array([1 if pow(h % 256 + 1, 128, 257) == 1 else -1 for h in range(head_dim)])
    return each[:, None] * np.kron(np.eye(head_dim // block(head_dim)), hadamard)
