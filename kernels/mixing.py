"""Mixing: a fixed orthogonal map of the H channels, signs and then a Hadamard transform, up to a factor.

It leaves every product of a query and a key as it was if both are mixed, and spreads a channel that is far larger than the
others over all of them (QuaRot, arXiv 2404.00456). Qwen2.5 has such channels: biases of keys, and the queries that meet the
keys of an attention sink, whose one product makes most of a score. Spread, their roundings cancel; and numbers of 8 bits are
fitted to all channels, not to the loudest. Keys are mixed after their rotation; so are the queries that meet them.

Both are mixed by entries of 1 and -1 over powers of two, which leave products as they were: nothing but sums is rounded. With
128 channels both stay in float16's range: queries up to 65,504 a channel and a mean magnitude of 4,000, keys of 8,000.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike


def mixes(dtype: DTypeLike) -> bool:
    """Whether keys that are held in this dtype are mixed before they are rounded to it: all but 32-bit ones."""
    return jnp.dtype(dtype).itemsize < 4


def mix(q: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Queries float32[..., H] times `queries_matrix`, as they meet the keys of `mix_keys`, in `dtype`, rounded once."""
    return _mixed(q, queries_matrix(q.shape[-1]), dtype, dtype)


def mix_keys(k: jax.Array, dtype: DTypeLike, *, parts: DTypeLike | None = None) -> jax.Array:
    """Keys, or values of 8 bits, float32[..., H] times `keys_matrix`, in `dtype`; `parts`, by default `dtype`: see `_mixed`."""
    return _mixed(k, keys_matrix(k.shape[-1]), dtype, dtype if parts is None else parts)


def unmix(x: jax.Array) -> jax.Array:
    """What `mix_keys` was given, or means of it: [..., H] in x's dtype."""
    return _product("...J,HJ->...H", x, jnp.asarray(queries_matrix(x.shape[-1]), x.dtype), x.dtype)


def _mixed(x: jax.Array, matrix: np.ndarray, dtype: DTypeLike, parts: DTypeLike) -> jax.Array:
    """Where `parts` has 16 bits the product takes each number as two of them, what rounding leaves and the rest: rounded
    before, a channel that makes most of a score would lose what mixing is to keep."""
    if jnp.dtype(parts).itemsize >= 4:
        return _product("...H,HJ->...J", x, jnp.asarray(matrix, x.dtype), dtype)
    two = jnp.concatenate(in_two(x, parts), axis=-1)
    return _product("...H,HJ->...J", two, jnp.asarray(np.concatenate([matrix, matrix]), parts), dtype)


def _product(spec: str, x: jax.Array, matrix: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Sums as they leave the product in `dtype`: in float32 they would be prefill's largest array."""
    return jnp.einsum(spec, x, matrix, precision=lax.Precision.HIGHEST, preferred_element_type=dtype)


def in_two(x: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """float32 as the sum of two numbers of a 16-bit dtype."""
    bits = jnp.finfo(dtype)
    high = lax.reduce_precision(x, bits.nexp, bits.nmant)  # XLA may drop a conversion to and fro
    return high.astype(dtype), (x - high).astype(dtype)


def block(head_dim: int) -> int:
    """How many channels are mixed with each other: the largest power of two that divides H."""
    return head_dim & -head_dim


def queries_matrix(head_dim: int) -> np.ndarray:
    """`signs` over a power of two near the root of `block`: float64[H, H], exact in any dtype."""
    return signs(head_dim) / 2.0 ** (_bits(head_dim) // 2)


def keys_matrix(head_dim: int) -> np.ndarray:
    """`signs` over the power of two with which queries and keys have the products that they had: as `queries_matrix`."""
    return signs(head_dim) / 2.0 ** (_bits(head_dim) - _bits(head_dim) // 2)


def _bits(head_dim: int) -> int:
    return block(head_dim).bit_length() - 1


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
