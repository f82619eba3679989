"""Keys as a cache holds them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwen_jax.kernels.mixing import mix_keys, mixes
from qwen_jax.rope import Rotary


def held(
    k_BSKH: jax.Array, rotary: Rotary, dtype: Any = None, mixed: bool | None = None
) -> tuple[jax.Array, Rotary]:
    """(unrotated keys as [B, K, S, H] of a cache of `dtype`, by default theirs, the rotary whose queries meet them); `mixed` as
    such a cache has them, by default, or as the forward pass without a cache."""
    dtype = k_BSKH.dtype if dtype is None else jnp.dtype(dtype)
    k = jnp.swapaxes(rotary.rotate_keys(k_BSKH, jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)), 1, 2)
    mixed = mixes(dtype) if mixed is None else mixed
    k = mix_keys(k, dtype) if mixed else k.astype(dtype)
    return k, dataclasses.replace(rotary, mixed=mixed)
