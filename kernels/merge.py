"""Attention over disjoint keys, merged by log-sum-exp."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def merge(out: jax.Array, lse: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """One attention from parts over disjoint keys, which stand along `axis`: (out float32 [..., H], lse float32).

    Args:
        out: float32 [..., H], each part normalised.
        lse: float32, out's shape without H, natural; -inf for a part that saw no key, which counts nothing.
        axis: of both, not negative. If no part saw a key the result is 0 and -inf.
    """
    peak = lse.max(axis, keepdims=True)
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(peak), 0.0, peak))
    total = weight.sum(axis)
    merged = (out * weight[..., None]).sum(axis) / jnp.where(total > 0, total, 1.0)[..., None]
    return merged, jnp.squeeze(peak, axis) + jnp.log(total)
