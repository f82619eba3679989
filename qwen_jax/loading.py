"""From a checkpoint on disk to arrays on devices: each process reads what its devices hold."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from qwen_jax.convert import Progress, TensorSource, open_checkpoint
from qwen_jax.convert.source import DTYPES, Box, box_of, box_shape, magnitude, tensor_bytes
from qwen_jax.errors import CheckpointError, QwenJaxError
from qwen_jax.linear import quantise
from qwen_jax.params import Param, params
from qwen_jax.sharding import ShardingRules, full_mesh, shardings

__all__ = ["load_params", "open_checkpoint"]

_SMALL_STACK_BYTES = 64 << 20
_ALIGNMENT = 64  # bytes; CPU devices take arrays so aligned as they are, without a copy


def load_params(
    source: TensorSource,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike | None = None,
    weight_dtype: np.dtype | None = None,
    rules: ShardingRules | None = None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Loads every parameter onto the mesh, in the layout of the model.

    While one tensor travels to the devices the next one is read: host memory holds at most two tensors of one layer, beside
    what CPU devices hold anyway. A process reads the bytes its devices own once, however many of them hold a copy.

    Args:
        source: from `open_checkpoint`.
        mesh: as `full_mesh` takes it.
        dtype: bfloat16, float16 or float32; None keeps the checkpoint's.
        weight_dtype: int8 or float8_e4m3fn for the layers' matrices, rounded on the devices layer by layer: of the
            unrounded ones a device holds one layer's matrix at a time. None: `dtype`.
        rules: which dimension is split over which mesh axis.
        progress: called with (bytes of tensors placed, bytes in all).

    Returns:
        Arrays by `Param.path`, of `Param.shape(config)`; stacked rows ("layers.*") have all layers in front:
        [L, ...]. The scales of 8-bit matrices, float32[L, *out], by `Param.scale_path`.

    Raises:
        CheckpointError: a tensor is damaged, holds NaN or infinity, or a value that `dtype` cannot hold.
        QwenJaxError: the mesh does not divide the model.
    """
    config = source.config
    target = source.dtype if dtype is None else _supported(dtype)
    placed = shardings(config, full_mesh(mesh), rules)
    slots = [_slot(source, p, placed[p.path], target, weight_dtype) for p in params(config)]
    steps = [(slot, layer) for slot in slots for layer in slot.layers]
    total = sum(tensor_bytes(source, slot.param) for slot, _ in steps)
    done = 0
    loaded: dict[str, jax.Array] = {}
    reads = _one_ahead([functools.partial(slot.read, layer) for slot, layer in steps])
    for (slot, layer), shards in zip(steps, reads, strict=True):
        jax.block_until_ready(slot.put(layer, shards))  # its host copy can go, the next one is being read
        if layer == slot.layers[-1]:
            loaded |= slot.finish()
        done += tensor_bytes(source, slot.param)
        if progress:
            progress(done, total)
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


def _one_ahead(reads: Sequence[Callable[[], Shards]]) -> Iterator[Shards]:
    """The results in order, each read while the caller works on the one before it."""
    with ThreadPoolExecutor(1, thread_name_prefix="qwen-jax-ahead") as reader:
        pending = reader.submit(reads[0])
        for read in reads[1:]:
            shards = pending.result()
            pending = reader.submit(read)
            yield shards
        yield pending.result()


class _Slot(abc.ABC):
    """Takes one parameter, tensor by tensor."""

    def __init__(self, source: TensorSource, param: Param, sharding: NamedSharding, target: np.dtype) -> None:
        self.source, self.param, self.sharding, self.target = source, param, sharding, target
        self.layers: Sequence[int | None] = range(source.config.num_layers) if param.stacked else [None]
        self.tensor_sharding = (
            NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:])) if param.stacked else sharding
        )

    @property
    def boxes(self) -> dict[jax.Device, Box]:
        """The part of a tensor that each device of this process holds."""
        shape = self.param.shape(self.source.config)
        indices = self.tensor_sharding.addressable_devices_indices_map(shape)
        return {device: box_of(index, shape) for device, index in indices.items() if index is not None}

    def read(self, layer: int | None) -> Shards:
        """Reads what each device of this process holds of one tensor, in the checkpoint's dtype; runs in another thread."""
        parts = self._read_parts(layer, sorted(set(self.boxes.values())))
        return {device: parts[box] for device, box in self.boxes.items()}

    @abc.abstractmethod
    def put(self, layer: int | None, shards: Shards) -> object:
        """Sends it on its way; what is returned is ready when the shards are needed no more."""

    @abc.abstractmethod
    def finish(self) -> dict[str, jax.Array]:
        """The arrays of the parameter, by path."""

    def _read_parts(self, layer: int | None, boxes: list[Box]) -> dict[Box, np.ndarray]:
        """Reads distinct boxes of one tensor, in one go where together they fill a larger box."""
        hull = tuple(
            (min(start for start, _ in bounds), max(stop for _, stop in bounds))
            for bounds in zip(*boxes, strict=True)
        )
        if math.prod(box_shape(hull)) != sum(math.prod(box_shape(box)) for box in boxes):
            return {
                box: self._read_box(layer, box, _empty(box_shape(box), self.source.dtype)) for box in boxes
            }
        whole = self._read_box(layer, hull, _empty(box_shape(hull), self.source.dtype))
        return {
            box: whole[tuple(slice(a - h, b - h) for (a, b), (h, _) in zip(box, hull, strict=True))]
            for box in boxes
        }

    def _read_box(self, layer: int | None, box: Box, out: np.ndarray) -> np.ndarray:
        source, target = self.source, self.target
        array = source.read(self.param, layer, tuple(slice(*bounds) for bounds in box), out)
        if target != source.dtype and magnitude(array) >= _overflow(source.dtype, target):
            raise CheckpointError(
                f"{source.folder}: tensor {source.name(self.param, layer)} holds values that "
                f"{target.name} cannot: use bfloat16 or float32"
            )
        return array


class _Single(_Slot):
    """A parameter of one tensor."""

    def put(self, layer: int | None, shards: Shards) -> jax.Array:
        self._array = _cast(_place(shards, self.sharding), self.target, self.sharding)
        return self._array

    def finish(self) -> dict[str, jax.Array]:
        return {self.param.path: self._array}


class _HostStack(_Slot):
    """All layers collected before they travel, with nothing to compile: small parameters, and everything on CPU devices, which
    take the collected array as it is."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        shapes = {box: (len(self.layers), *box_shape(box)) for box in self.boxes.values()}
        self._stacks = {box: _empty(shape, self.target) for box, shape in shapes.items()}

    def read(self, layer: int | None) -> Shards:
        assert layer is not None
        boxes = sorted(self._stacks)
        if len(boxes) == 1 and self.source.dtype == self.target:
            self._read_box(layer, boxes[0], self._stacks[boxes[0]][layer])
        else:
            for box, part in self._read_parts(layer, boxes).items():
                self._stacks[box][layer] = part
        return {}

    def put(self, layer: int | None, shards: Shards) -> None:
        pass

    def finish(self) -> dict[str, jax.Array]:
        shards = {device: self._stacks[box] for device, box in self.boxes.items()}
        return {self.param.path: _place(shards, self.sharding)}


class _DeviceStack(_Slot):
    """Layers written one by one into a stack on the devices, rounded to 8 bits there if `weight_dtype` is given."""

    def __init__(self, *args: Any, weight_dtype: np.dtype | None, **named: Any) -> None:
        super().__init__(*args, **named)
        config, param = self.source.config, self.param
        letters = "L" + param.letters
        kinds = [(param.path, weight_dtype or self.target, len(letters))]
        if weight_dtype is not None:
            kinds.append((param.scale_path, np.dtype(np.float32), 1 + len(param.out_letters)))
        self._paths = [path for path, _, _ in kinds]
        spec, shape = self.sharding.spec, (config.num_layers, *param.shape(config))
        self._shardings = tuple(
            NamedSharding(self.sharding.mesh, PartitionSpec(*spec[:n])) for _, _, n in kinds
        )
        self._shapes = tuple(jax.ShapeDtypeStruct(shape[:n], dtype) for _, dtype, n in kinds)
        self._stacks: tuple[jax.Array, ...] | None = None

    def put(self, layer: int | None, shards: Shards) -> tuple[jax.Array, ...]:
        if self._stacks is None:
            self._stacks = _zeros(self._shapes, self._shardings)
        assert layer is not None
        array = _place(shards, self.tensor_sharding)
        self._stacks = _write_layer(self._stacks, array, np.int32(layer), self._shardings)
        return self._stacks

    def finish(self) -> dict[str, jax.Array]:
        assert self._stacks is not None
        return dict(zip(self._paths, self._stacks, strict=True))


def _slot(
    source: TensorSource,
    param: Param,
    sharding: NamedSharding,
    target: np.dtype,
    weight_dtype: np.dtype | None,
) -> _Slot:
    if not param.stacked:
        return _Single(source, param, sharding, target)
    if weight_dtype is not None and param.is_layer_matrix:
        # Rounded from what the file holds: `target` is no step between.
        return _DeviceStack(source, param, sharding, source.dtype, weight_dtype=weight_dtype)
    if _collects(sharding, tensor_bytes(source, param) * source.config.num_layers):
        return _HostStack(source, param, sharding, target)
    return _DeviceStack(source, param, sharding, target, weight_dtype=None)


def _collects(sharding: NamedSharding, nbytes: int) -> bool:
    """Whether a stack of this size is put together on the host."""
    return nbytes <= _SMALL_STACK_BYTES or sharding.mesh.devices.flat[0].platform == "cpu"


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _place(shards: Shards, sharding: NamedSharding) -> jax.Array:
    placed = [jax.device_put(shard, device) for device, shard in shards.items()]
    shape = _global_shape(placed[0].shape, sharding)
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _global_shape(shard_shape: tuple[int, ...], sharding: NamedSharding) -> tuple[int, ...]:
    ways = [1 if axis is None else sharding.mesh.shape[axis] for axis in sharding.spec]
    return tuple(size * n for size, n in zip(shard_shape, ways, strict=True))


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(
    shapes: tuple[jax.ShapeDtypeStruct, ...], shardings: tuple[NamedSharding, ...]
) -> tuple[jax.Array, ...]:
    return _constrained((jnp.zeros(x.shape, x.dtype) for x in shapes), shardings)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _write_layer(
    stacks: tuple[jax.Array, ...], array: jax.Array, layer: jax.Array, shardings: tuple[NamedSharding, ...]
) -> tuple[jax.Array, ...]:
    """Writes one layer into the donated stack, in place; into two, numbers and scales, as `linear.quantise` makes them."""
    parts: tuple[jax.Array, ...] = (array.astype(stacks[0].dtype),)
    if len(stacks) == 2:
        parts = quantise(array, stacks[0].dtype, range(stacks[1].ndim - 1, array.ndim))
    update = functools.partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return _constrained(map(update, stacks, parts), shardings)


def _constrained(arrays: Iterable[jax.Array], shardings: tuple[NamedSharding, ...]) -> tuple[jax.Array, ...]:
    return tuple(map(jax.lax.with_sharding_constraint, arrays, shardings))


def _cast(array: jax.Array, dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    if array.dtype == dtype:
        return array
    return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)(array)
