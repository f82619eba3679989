"""From a checkpoint on disk to arrays on devices: each process reads what its devices hold."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from qwen_jax.convert import Progress, TensorSource, open_checkpoint
from qwen_jax.convert.source import DTYPES, Box, box_of, box_shape, magnitude, tensor_bytes
from qwen_jax.errors import CheckpointError, QwenJaxError
from qwen_jax.params import Param, params
from qwen_jax.sharding import ShardingRules, full_mesh, shardings

__all__ = ["load_params", "open_checkpoint"]

_SMALL_STACK_BYTES = 64 << 20


def load_params(
    source: TensorSource,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    rules: ShardingRules | None = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Loads every parameter onto the mesh, in the layout of the model.

    Host memory holds at most two tensors of one layer; a process reads the bytes its devices own once,
    however many of them hold a copy.

    Args:
        source: from `open_checkpoint`.
        mesh: as `full_mesh` takes it.
        dtype: bfloat16, float16 or float32; None keeps the checkpoint's.
        rules: which dimension is split over which mesh axis.
        progress: called with (bytes of tensors placed, bytes in all).

    Returns:
        Arrays by `Param.path`, of `Param.shape(config)`; stacked rows ("layers.*") have all layers in front:
        [L, ...].

    Raises:
        CheckpointError: a tensor is damaged, holds NaN or infinity, or a value that `dtype` cannot hold.
        QwenJaxError: the mesh does not divide the model.
    """
    config = source.config
    target = source.dtype if dtype is None else _supported(dtype)
    placed = shardings(config, full_mesh(mesh), rules)
    rows = params(config)
    total = sum(tensor_bytes(source, p) * (config.num_layers if p.stacked else 1) for p in rows)
    done = 0

    def advance(param: Param) -> None:
        nonlocal done
        done += tensor_bytes(source, param)
        if progress:
            progress(done, total)

    loaded: dict[str, jax.Array] = {}
    for param in rows:
        read = functools.partial(_read_shards, source, param, target=target)
        sharding = placed[param.path]
        if not param.stacked:
            loaded[param.path] = _cast(_place(read(None, sharding), sharding), target, sharding)
            advance(param)
            continue
        layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        layers = (read(layer, layer_sharding) for layer in range(config.num_layers))
        if tensor_bytes(source, param) * config.num_layers <= _SMALL_STACK_BYTES:
            loaded[param.path] = _stack_on_host(layers, target, sharding, functools.partial(advance, param))
        else:
            shape = (config.num_layers, *param.shape(config))
            stack = _zeros(shape, target, sharding)
            for layer, shards in enumerate(layers):
                array = _place(shards, layer_sharding)
                stack.block_until_ready()  # the layer before is on the device: its host copy can go
                stack = _write_layer(stack, array, np.int32(layer), sharding)
                advance(param)
            loaded[param.path] = stack
    return loaded


def _supported(dtype: DTypeLike) -> np.dtype:
    choices = ", ".join(DTYPES)
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise QwenJaxError(f"dtype {dtype!r} is not one of {choices}") from None
    if found not in DTYPES.values():
        raise QwenJaxError(f"dtype {found} is not one of {choices}")
    return found


Shards = dict[jax.Device, np.ndarray]


def _read_shards(
    source: TensorSource, param: Param, layer: int | None, sharding: NamedSharding, *, target: np.dtype
) -> Shards:
    """What each device of this process holds of one tensor, in the checkpoint's dtype."""
    shape = param.shape(source.config)
    boxes = {
        device: box_of(index, shape)
        for device, index in sharding.addressable_devices_indices_map(shape).items()
        if index is not None
    }
    parts = _read_parts(source, param, layer, sorted(set(boxes.values())), target)
    return {device: parts[box] for device, box in boxes.items()}


def _place(shards: Shards, sharding: NamedSharding) -> jax.Array:
    placed = [jax.device_put(shard, device) for device, shard in shards.items()]
    shape = _global_shape(placed[0].shape, sharding)
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _global_shape(shard_shape: tuple[int, ...], sharding: NamedSharding) -> tuple[int, ...]:
    ways = [1 if axis is None else sharding.mesh.shape[axis] for axis in sharding.spec]
    return tuple(size * n for size, n in zip(shard_shape, ways, strict=True))


def _stack_on_host(
    layers: Iterator[Shards], dtype: np.dtype, sharding: NamedSharding, advance: Callable[[], None]
) -> jax.Array:
    """All layers of a small parameter at once: norms, biases, and everything of a small model, with nothing to compile."""
    collected: dict[jax.Device, list[np.ndarray]] = {}
    for shards in layers:
        for device, shard in shards.items():
            collected.setdefault(device, []).append(shard)
        advance()
    stacks: dict[
        tuple[int, ...], np.ndarray
    ] = {}  # by the arrays stacked: devices that hold copies share them
    for parts in collected.values():
        key = tuple(map(id, parts))
        if key not in stacks:
            stacks[key] = np.stack(parts).astype(dtype, copy=False)
    return _place({device: stacks[tuple(map(id, parts))] for device, parts in collected.items()}, sharding)


def _read_parts(
    source: TensorSource, param: Param, layer: int | None, boxes: list[Box], target: np.dtype
) -> dict[Box, np.ndarray]:
    """Reads distinct boxes of one tensor, in one go where together they fill a larger box."""
    hull = tuple(
        (min(start for start, _ in bounds), max(stop for _, stop in bounds))
        for bounds in zip(*boxes, strict=True)
    )
    fills = math.prod(box_shape(hull)) == sum(math.prod(box_shape(box)) for box in boxes)
    whole = {hull: _read_box(source, param, layer, hull, target)} if fills else {}
    parts: dict[Box, np.ndarray] = {}
    for box in boxes:
        if fills:
            inside = tuple(slice(a - h, b - h) for (a, b), (h, _) in zip(box, hull, strict=True))
            parts[box] = whole[hull][inside]
        else:
            parts[box] = _read_box(source, param, layer, box, target)
    return parts


def _read_box(
    source: TensorSource, param: Param, layer: int | None, box: Box, target: np.dtype
) -> np.ndarray:
    array = source.read(param, layer, tuple(slice(*bounds) for bounds in box))
    largest = magnitude(array)
    if target != source.dtype and largest >= _overflow(source.dtype, target):
        raise CheckpointError(
            f"{source.folder}: tensor {source.name(param, layer)} holds values that "
            f"{target.name} cannot: use bfloat16 or float32"
        )
    return array


@functools.cache
def _overflow(dtype: np.dtype, target: np.dtype) -> int:
    """Bit pattern of the smallest magnitude of `dtype` that becomes infinite in `target`."""
    low, high = 0, magnitude(np.array([np.inf], dtype))
    bits = np.dtype(f"u{dtype.itemsize}")
    with np.errstate(over="ignore"):
        while low < high:  # bit patterns order as the values do
            middle = (low + high) // 2
            value = np.array([middle], bits).view(dtype).astype(np.float32).astype(target).astype(np.float32)
            low, high = (low, middle) if np.isinf(value[0]) else (middle + 1, high)
    return low


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write_layer(stack: jax.Array, array: jax.Array, layer: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Writes one layer into the donated stack, in place."""
    written = jax.lax.dynamic_update_index_in_dim(stack, array.astype(stack.dtype), layer, axis=0)
    return jax.lax.with_sharding_constraint(written, sharding)


def _cast(array: jax.Array, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    if array.dtype == dtype:
        return array
    return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)(array)
