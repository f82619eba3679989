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
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from qwen_jax.config import ModelConfig
from qwen_jax.kernels.blocks import Share
from qwen_jax.sharding import ShardingRules


class KVCache(NamedTuple):
    """Keys and values of all layers: k, v [L, B, K, S, H], slot S = absolute position in tokens.

    Over a mesh axis `context` each device holds the positions that `kernels.blocks` deals to it, and S is all of the first
    device's slots, then all of the second's, and so on.
    """

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
    """A KVCache of NamedShardings on a mesh as `sharding.full_mesh` returns it."""
    leaf: Any = NamedSharding(mesh, ShardingRules().spec("LBKSH"))
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
    cache: KVCache,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    layer: jax.Array,
    start: jax.Array,
    first: jax.Array | int = 0,
    share: Share | None = None,
) -> KVCache:
    """Writes T consecutive positions of every row from `start` on; start + T must not pass the capacity.

    With a `share` the T are this device's part of a piece of whole rounds, `start` begins a round, and positions below `first`
    stay as they are.
    """

    def write(buffer: jax.Array, x_BTKH: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x_BTKH, 1, 2)[None].astype(buffer.dtype)
        if share is None:
            return lax.dynamic_update_slice(buffer, x, (layer, 0, 0, start, 0))
        slot = share.blocks.slot(start)
        new_T = share.position(slot + jnp.arange(x.shape[3], dtype=jnp.int32)) >= first
        new_T = new_T.reshape(-1, *[1] * (x.ndim - 4))
        at = (layer, 0, 0, slot, 0)
        return lax.dynamic_update_slice(
            buffer, jnp.where(new_T, x, lax.dynamic_slice(buffer, at, x.shape)), at
        )

    return KVCache(write(cache.k, k_BTKH), write(cache.v, v_BTKH))


def write_token(
    cache: KVCache,
    k_BKH: jax.Array,
    v_BKH: jax.Array,
    *,
    layer: jax.Array,
    positions_B: jax.Array,
    share: Share | None = None,
) -> KVCache:
    """Writes one position a row, each row at its own; positions past the capacity, and of other devices' share, are dropped."""
    rows, slots_B = jnp.arange(cache.batch), positions_B
    if share is not None:
        mine_B = share.blocks.owner(positions_B) == share.rank
        slots_B = jnp.where(mine_B, share.blocks.slot(positions_B), cache.capacity)

    def write(buffer: jax.Array, x_BKH: jax.Array) -> jax.Array:
        return buffer.at[layer, rows, :, slots_B].set(x_BKH.astype(buffer.dtype), mode="drop")

    return KVCache(write(cache.k, k_BKH), write(cache.v, v_BKH))
