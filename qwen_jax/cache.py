"""The KV cache: one pytree, allocated once, updated in place.

Heads stand before positions and the whole cache travels with a layer index: measured on compiled programs, every other
arrangement costs a copy of a layer or of the cache. Keys are stored rotated at j mod s and not scaled by the length
temperature, so a prefix serves a longer prompt unchanged; in fewer than 32 bits they are mixed before they are rounded
(`kernels.mixing`), and those of a bfloat16 cache are float16 (`keys_dtype`). With 8-bit dtypes both keys and values are held as
`kernels.quantised` says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from qwen_jax.config import ModelConfig
from qwen_jax.kernels import quantised
from qwen_jax.kernels.blocks import Share
from qwen_jax.kernels.mixing import mix_keys, mixes
from qwen_jax.kernels.tpu import flat, generation, target
from qwen_jax.rope import Rotary
from qwen_jax.sharding import ShardingRules


class KVCache(NamedTuple):
    """Keys and values of all layers: k, v [L, B, K, S, H], slot S = absolute position in tokens.

    Over a mesh axis `context` each device holds the positions that `kernels.blocks` deals to it, and S is all of the first
    device's slots, then all of the second's, and so on. An 8-bit cache has its factors beside it, k_scale and v_scale
    float32[L, B, K, S].
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """Positions a row can hold, tokens."""
        return self.k.shape[3]

    def met_by(self, rotary: Rotary) -> Rotary:
        """A model's rotary, made to rotate queries as these keys lie."""
        return dataclasses.replace(rotary, mixed=mixes(self.k.dtype))

    @property
    def dtype(self) -> np.dtype:
        """What the cache was asked to be in: that of its values."""
        return jnp.dtype(self.v.dtype)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.k.shape[1]


def cache_shape(config: ModelConfig, batch: int, capacity: int) -> tuple[int, int, int, int, int]:
    """[L, B, K, S, H] for k and for v."""
    return config.num_layers, batch, config.num_kv_heads, capacity, config.head_dim


def is_8_bit(dtype: DTypeLike) -> bool:
    """Whether a cache of this dtype holds numbers with factors."""
    return jnp.dtype(dtype) in quantised.DTYPES


def keys_dtype(dtype: DTypeLike) -> np.dtype:
    """What keys beside values of `dtype` are held in, or read in by prefill if they have 8 bits: float16 beside bfloat16, but
    for TPUs, which multiply none.

    Mixed, keys are in its range, and its three more bits keep more of every score.
    """
    finer = jnp.dtype(dtype) == jnp.bfloat16 and not target().startswith("TPU")
    return jnp.dtype(jnp.float16 if finer else dtype)


def abstract_cache(config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike) -> Any:
    """A KVCache of ShapeDtypeStructs: nothing is allocated."""
    shape = cache_shape(config, batch, capacity)
    k, v = (jax.ShapeDtypeStruct(shape, x) for x in (keys_dtype(dtype), jnp.dtype(dtype)))
    return _cache_of(dtype, k, v, jax.ShapeDtypeStruct(shape[:-1], jnp.float32))


def cache_shardings(mesh: Mesh, dtype: DTypeLike) -> Any:
    """A KVCache of NamedShardings on a mesh as `sharding.full_mesh` returns it."""
    numbers, scales = (NamedSharding(mesh, ShardingRules().spec(letters)) for letters in ("LBKSH", "LBKS"))
    return _cache_of(dtype, numbers, numbers, scales)


def _cache_of(dtype: DTypeLike, k: Any, v: Any, scales: Any) -> KVCache:
    return KVCache(k, v, scales, scales) if is_8_bit(dtype) else KVCache(k, v)


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike, mesh: Mesh | None = None
) -> KVCache:
    """An empty cache, allocated on the mesh (default: the default device)."""
    return _allocator(config, batch, capacity, jnp.dtype(dtype), mesh)()


@functools.cache
def _allocator(
    config: ModelConfig, batch: int, capacity: int, dtype: np.dtype, mesh: Mesh | None
) -> Callable[[], KVCache]:
    """Kept, so that a second cache of a size compiles nothing."""
    abstract = abstract_cache(config, batch, capacity, dtype)

    def empty_cache() -> KVCache:
        empty: KVCache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        return empty

    return jax.jit(empty_cache, out_shardings=cache_shardings(mesh, dtype) if mesh else None)


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

    def write(buffer: jax.Array, x_BTK: jax.Array) -> jax.Array:
        x = jnp.swapaxes(x_BTK, 1, 2)[None]
        if share is None:
            return lax.dynamic_update_slice(buffer, x, (layer, 0, 0, start, 0)[: x.ndim])
        slot = share.blocks.slot(start)
        new_T = share.position(slot + jnp.arange(x.shape[3], dtype=jnp.int32)) >= first
        new_T = new_T.reshape(-1, *[1] * (x.ndim - 4))
        at = (layer, 0, 0, slot, 0)[: x.ndim]
        return lax.dynamic_update_slice(
            buffer, jnp.where(new_T, x, lax.dynamic_slice(buffer, at, x.shape)), at
        )

    return jax.tree.map(in_place, jax.tree.map(write, cache, _entries(cache, k_BTKH, v_BTKH)))


def in_place(buffer: jax.Array) -> jax.Array:
    """The buffer in the layout in which it arrives and leaves. Left alone, the TPU compiler carries a cache through the layers
    in whatever layout an operation of XLA's that reads it likes best, and copies all of it."""
    if generation(target()) is None or buffer.ndim < 5:
        return buffer
    order = (0, 1, 2, 4, 3) if flat(buffer.shape[-1]) else (0, 1, 2, 3, 4)
    return with_layout_constraint(buffer, Layout(order))


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

    def write(buffer: jax.Array, x_BK: jax.Array) -> jax.Array:
        return buffer.at[layer, rows, :, slots_B].set(x_BK, mode="drop")

    return jax.tree.map(write, cache, _entries(cache, k_BKH, v_BKH))


def _entries(cache: KVCache, k: jax.Array, v: jax.Array) -> KVCache:
    """Keys, rotated, and values [..., H] as this cache holds them."""
    dtype = cache.k.dtype
    if cache.k_scale is None:
        k = mix_keys(k.astype(jnp.float32), dtype) if mixes(dtype) else k
        return KVCache(k.astype(dtype), v.astype(cache.dtype))
    (k, k_scale), (v, v_scale) = (quantised.quantise(x, dtype) for x in (k, v))
    return KVCache(k, v, k_scale, v_scale)


def read_layer(cache: KVCache, layer: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer for prefill: (k [L, B, K, S, H], v likewise, the index in L under which it lies).

    That is the cache itself, uncopied; of an 8-bit cache the one layer alone, L = 1, as `kernels.quantised.read_mixed` makes
    it: values too are then mixed. Values come in `dtype`, keys in `keys_dtype` of it.
    """
    if cache.k_scale is None or cache.v_scale is None:
        return cache.k, cache.v, layer
    k = quantised.read_mixed(cache.k, cache.k_scale, layer, keys_dtype(dtype))
    return k, quantised.read_mixed(cache.v, cache.v_scale, layer, dtype), jnp.int32(0)
