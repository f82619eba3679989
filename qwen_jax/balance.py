"""The model that an 8-bit cache is made for: the same function, its keys of more even channels.

Qwen2.5 adds biases to its keys that are far larger than what they are added to, in a few channels. A factor on a rotation pair
of the keys is undone by its inverse on the same pair of the queries, whatever the positions, and powers of two change no digit:
the model computes what it did. Eight bits then make the same error in every channel, which its query multiplies, so the sum is
least where channels have magnitudes in proportion: factors sqrt(|q| / |k|).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.model import Qwen2

_Linear = tuple[
    jax.Array, jax.Array | None, jax.Array
]  # weight [L, heads, H, D], scale or None, bias [L, heads, H]
_LARGEST = 12  # of the exponents: float16 overflows at 2^16
_TINY = 1e-20


def balanced(model: Qwen2) -> Qwen2:
    """A model with the arrays of `model`, but new ones for queries and keys; its caches fit no other model."""
    graph, state = nnx.split(model)
    leaves = dict(nnx.to_flat_state(state))
    linears = model.layers.attn.q, model.layers.attn.k
    # Of an 8-bit matrix the scale of each output takes the power of two.
    parts = [("weight" if x.scale is None else "scale", "bias") for x in linears]
    paths = [
        ("layers", "attn", kind, part) for kind, names in zip("qk", parts, strict=True) for part in names
    ]
    shardings = [leaves[path][...].sharding for path in paths]
    given = [tuple(None if p is None else p[...] for p in (x.weight, x.scale, x.bias)) for x in linears]
    arrays = jax.jit(_balance, out_shardings=shardings)(*given, model.layers.input_norm.weight[...])
    for path, array in zip(paths, arrays, strict=True):
        leaves[path] = leaves[path].replace(array)
    return nnx.merge(graph, nnx.from_flat_state(leaves.items()))


def _balance(q: _Linear, k: _Linear, norm_LD: jax.Array) -> list[jax.Array]:
    """New weights (or scales) and biases of queries, then of keys."""
    L, K, H = k[2].shape
    q_LKF, k_LKF = (_squares(x, norm_LD).reshape(L, K, -1, 2, H // 2).mean((2, 3)) for x in (q, k))
    exponent_LKF = jnp.round(jnp.log2((q_LKF + _TINY) / (k_LKF + _TINY)) / 4).astype(jnp.int32)
    exponent_LKH = jnp.tile(jnp.clip(exponent_LKF, -_LARGEST, _LARGEST), 2)

    def times(x: jax.Array, exponent: jax.Array) -> jax.Array:
        """x [L, heads, H, ...] times 2^exponent, exactly."""
        exponent = jnp.repeat(exponent, x.shape[1] // K, axis=1)
        factor = jnp.ldexp(jnp.float32(1), exponent).astype(x.dtype)
        return x * factor.reshape(*factor.shape, *(1,) * (x.ndim - 3))

    return [
        times(x, exponent)
        for (weight, scale, bias), exponent in ((q, -exponent_LKH), (k, exponent_LKH))
        for x in (weight if scale is None else scale, bias)
    ]


def _squares(linear: _Linear, norm_LD: jax.Array) -> jax.Array:
    """Mean squares of the outputs [L, heads, H] for inputs of independent channels, as the norm before leaves them."""
    weight, scale, bias = linear
    norm = norm_LD.astype(jnp.float32)[:, None, None]
    squares = ((weight.astype(jnp.float32) * norm) ** 2).sum(-1)
    return (squares if scale is None else squares * scale**2) + bias.astype(jnp.float32) ** 2
