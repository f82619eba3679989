"""The KV cache: one pytree, allocated once, updated in place.

Heads stand before positions and the whole cache travels with a layer index: measured on compiled programs, every other
arrangement costs a copy of a layer or of the cache. Keys are stored rotated at j mod s and not scaled by the length
temperature, so a prefix serves a longer prompt unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from qwen_jax.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of all layers: k, v [L, B, K, S, H], slot S = absolute position in tokens."""

    k: jax.Array
    v: jax.Array

    @property
    def capacity(self) -> int:
        """Positions a row can hold, tokens."""
        return self.k.shape[3]

    @property
    def batch(self) -> int:
        """Rows."""
        return self.k.shape[1]


def cache_shape(config: ModelConfig, batch: int, capacity: int) -> tuple[int, int, int, int, int]:
    """[L, B, K, S, H] for k and for v."""
    return config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim


def abstract_cache(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> Any:
    """A KVCache of ShapeDtypeStructs: nothing is allocated."""
    leaf: Any = jax.ShapeDtypeStruct(cache_shape(config, batch, capacity), dtype)
    return KVCache(leaf, leaf)


def cache_shardings(mesh: Mesh) -> Any:
    """A KVCache of NamedShardings: KV heads over the axis `tensor` where the mesh has one, the rest replicated."""
    heads = "tensor" if "tensor" in mesh.axis_names else None
    leaf: Any = NamedSharding(mesh, PartitionSpec(None, None, heads, None, None))
    return KVCache(leaf, leaf)


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike, mesh: Mesh | None = None
) -> KVCache:
    """An empty cache, allocated on the mesh (default: the default device)."""
    return _allocator(cache_shape(config, batch, capacity), jnp.dtype(dtype), mesh)()


@functools.cache
def _allocator(shape: tuple[int, ...], dtype: np.dtype, mesh: Mesh | None) -> Callable[[], KVCache]:
    """Kept, so that a second cache of a size compiles nothing."""

    def zeros() -> KVCache:
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return jax.jit(zeros, out_shardings=cache_shardings(mesh) if mesh else None)


def write_chunk(
    cache: KVCache, k_BTKH: jax.Array, v_BTKH: jax.Array, *, layer: jax.Array, start: jax.Array
) -> KVCache:
    """Writes T consecutive positions of every row from `start` on; start + T must not pass the capacity."""

    def write(buffer: jax.Array, x_BTKH: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x_BTKH, 1, 2)[None].astype(buffer.dtype)
        return lax.dynamic_update_slice(buffer, x, (layer, 0, 0, start, 0))

    return KVCache(write(cache.k, k_BTKH), write(cache.v, v_BTKH))


def write_token(
    cache: KVCache, k_BKH: jax.Array, v_BKH: jax.Array, *, layer: jax.Array, positions_B: jax.Array
) -> KVCache:
    """Writes one position a row, each row at its own; positions past the capacity are dropped."""
    rows = jnp.arange(cache.batch)

    def write(buffer: jax.Array, x_BKH: jax.Array) -> jax.Array:
        return buffer.at[layer, rows, :, positions_B].set(x_BKH.astype(buffer.dtype), mode="drop")

    return KVCache(write(cache.k, k_BKH), write(cache.v, v_BKH))
