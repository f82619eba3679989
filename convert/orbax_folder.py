"""A converted folder: params/ is an orbax checkpoint with one leaf per layer and parameter; the other files
are as they came.

A leaf lies in the model's shape, with one change: the dimension that tensor parallelism splits is stored as
two, [pieces, size / pieces], and each piece is a chunk of its own on disk. `pieces` is a multiple of the
widest tensor mesh the model allows, so a device of any mesh reads whole chunks, and only its own.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.convert.source import Box, TensorSource, leaf_name, report, summarise, tensors
from qwen_jax.errors import CheckpointError
from qwen_jax.params import Param
from qwen_jax.sharding import ShardingRules, widest_tensor

PARAMS = "params"
_CHUNK_BYTES = 32 << 20
_MAX_PIECES = 1024
_MANIFEST = "manifest.ocdbt"
_ZARRAY = "/.zarray"
_ZARR_DTYPES = {"bfloat16": "bfloat16", "float16": "<f2", "float32": "<f4"}
# Chunks in flight are memory: four of them keep a disk busy.
# The cache is for the nodes of the store's tree, which every leaf would read again.
_READ_CONTEXT = {"file_io_concurrency": {"limit": 4}, "cache_pool#tree": {"total_bytes_limit": 16 << 20}}


def split_axis(param: Param) -> int | None:
    """The dimension that is stored in pieces; None for parameters that every device holds whole."""
    return ShardingRules().tensor_axis(param.letters)


def stored_shape(param: Param, config: ModelConfig, itemsize: int) -> tuple[int, ...]:
    """Shape of one leaf on disk."""
    shape, axis = param.shape(config), split_axis(param)
    if axis is None:
        return shape
    widest, size, nbytes = widest_tensor(config), shape[axis], math.prod(shape) * itemsize
    allowed = [n for n in range(widest, min(size, _MAX_PIECES) + 1, widest) if size % n == 0] or [widest]
    pieces = next((n for n in allowed if nbytes <= n * _CHUNK_BYTES), allowed[-1])
    return (*shape[:axis], pieces, size // pieces, *shape[axis + 1 :])


class OrbaxFolder(TensorSource):
    """Reads a converted folder, one slice of one leaf at a time, through tensorstore (what orbax itself
    stores with).

    Raises:
        CheckpointError: not a finished conversion, or leaves that are missing, extra, mis-shaped or of
        another dtype.
        ConfigError: config.json is missing, broken or asks for something else.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, ModelConfig.from_folder(folder))
        stores = sorted(path.parent for path in (folder / PARAMS).glob(f"*/{_MANIFEST}"))
        if len(stores) != 1:
            raise CheckpointError(
                f"{folder / PARAMS}: not a finished orbax checkpoint: convert the model again"
            )
        self._kvstore = {"driver": "ocdbt", "base": f"file://{stores[0]}/", "cache_pool": "cache_pool#tree"}
        self._context = _tensorstore().Context(_READ_CONTEXT)
        zarrays, chunks = self._list()
        report(folder / PARAMS, self._problems(zarrays, chunks))
        self._shapes = {name: tuple(zarray["shape"]) for name, zarray in zarrays.items()}

    def name(self, param: Param, layer: int | None = None) -> str:
        return leaf_name(param, layer)

    def _list(self) -> tuple[dict[str, dict[str, Any]], Mapping[str, int]]:
        """The zarr metadata of every leaf, and how many chunks of it are stored."""
        try:
            store = _tensorstore().KvStore.open(self._kvstore, context=self._context).result()
            keys = [key.decode() for key in store.list().result()]
            names = sorted(key.removesuffix(_ZARRAY) for key in keys if key.endswith(_ZARRAY))
            reads = {name: store.read(name + _ZARRAY) for name in names}
            zarrays = {name: json.loads(read.result().value) for name, read in reads.items()}
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{self.folder / PARAMS} is damaged: {_first_line(error)}") from None
        return zarrays, collections.Counter(
            key.rpartition("/")[0] for key in keys if not key.endswith(_ZARRAY)
        )

    def _problems(self, zarrays: dict[str, dict[str, Any]], chunks: Mapping[str, int]) -> list[str]:
        expected = {leaf_name(p, layer): p for p, layer in tensors(self.config)}
        problems = []
        if missing := [name for name in expected if name not in zarrays]:
            problems.append(f"missing {summarise(missing)}")
        if extra := [name for name in zarrays if name not in expected]:
            problems.append(f"{summarise(extra)} not part of the model that config.json describes")
        for name in expected.keys() & zarrays.keys():
            param, stored = expected[name], tuple(zarrays[name]["shape"])
            shape = _merged(stored, split_axis(param))
            if shape != param.shape(self.config):
                problems.append(
                    f"{name} is {list(shape)} where config.json says {list(param.shape(self.config))}"
                )
            if zarrays[name]["dtype"] != _ZARR_DTYPES[self.config.dtype]:
                problems.append(
                    f"{name} is stored as {zarrays[name]['dtype']} where config.json says {self.config.dtype}"
                )
            if chunks[name] != math.prod(
                -(-s // c) for s, c in zip(stored, zarrays[name]["chunks"], strict=True)
            ):
                problems.append(f"{name} lacks some of its chunks")
        return problems

    def _read(self, param: Param, layer: int | None, box: Box, out: np.ndarray | None) -> np.ndarray:
        name, axis = leaf_name(param, layer), split_axis(param)
        stored = self._shapes[name]
        cover, trim = list(box), [slice(None)] * len(box)
        if axis is not None:  # whole pieces that cover the box, then the box
            per_piece = stored[axis + 1]
            (start, stop) = box[axis]
            first, last = start // per_piece, -(-stop // per_piece)
            cover[axis : axis + 1] = [(first, last), (0, per_piece)]
            trim[axis] = slice(start - first * per_piece, stop - first * per_piece)
        shape = tuple(last - first for first, last in cover)
        merged = _merged(shape, axis)
        # Straight to where it is wanted, if that is all of what is read: a copy, and touching new memory, cost as much again.
        into = out if out is not None and out.shape == merged else None
        array = np.empty(shape, self.dtype) if into is None else into.reshape(shape)
        try:
            leaf = _open_leaf(self._kvstore, name, self._context)
            span = leaf[tuple(slice(*bounds) for bounds in cover)]
            _tensorstore().array(array).write(span[_tensorstore().d[:].translate_to[0]]).result()
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{self.folder / PARAMS}: {name} is damaged: {_first_line(error)}"
            ) from None
        self.bytes_read += array.nbytes
        array = array.reshape(merged)[tuple(trim)]
        if out is None:
            return array
        if into is None:
            np.copyto(out, array)
        return out


def _open_leaf(kvstore: dict[str, Any], name: str, context: Any) -> Any:
    spec = {
        "driver": "zarr",
        "kvstore": {**kvstore, "path": name + "/"},
        "fill_missing_data_reads": False,
    }
    return _tensorstore().open(spec, open=True, read=True, context=context).result()


def _merged(stored: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """The model's shape of a stored shape: pieces joined."""
    if axis is None or len(stored) < axis + 2:
        return stored
    return (*stored[:axis], stored[axis] * stored[axis + 1], *stored[axis + 2 :])


@functools.cache
def _tensorstore() -> ModuleType:
    import tensorstore  # 0.1 s and 30 MB that loading a Hugging Face folder does not need

    return tensorstore


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


class OrbaxWriter:
    """Writes params/ of a converted folder, some leaves at a time; it exists only once `finish` has returned.

    Args:
        folder: the converted folder in the making.
        config: of the model.
        dtype: of the leaves.
    """

    def __init__(self, folder: Path, config: ModelConfig, dtype: np.dtype) -> None:
        self._path = folder / PARAMS
        self._shapes = {leaf_name(p, n): stored_shape(p, config, dtype.itemsize) for p, n in tensors(config)}
        self._axes = {leaf_name(p, n): split_axis(p) for p, n in tensors(config)}

    def write(self, leaves: Mapping[str, np.ndarray]) -> None:
        """Adds leaves by `leaf_name`, in the model's shape. Each call costs orbax a pass over the metadata.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        import orbax.checkpoint.experimental.v1 as ocp

        storage = ocp.options.ArrayOptions.Saving.StorageOptions

        def one_chunk_a_piece(key: Any, value: Any) -> Any:
            axis = self._axes[key[-1].key]
            return storage(shard_axes=() if axis is None else (axis,))

        context = ocp.Context()
        context.array.saving.use_zarr3 = False
        context.array.saving.use_compression = (
            False  # bfloat16 weights hardly shrink; loading them is what counts
        )
        context.array.saving.scoped_storage_options_creator = one_chunk_a_piece
        context.memory.deepcopy_host_arrays = False  # nobody changes them before `save` returns
        with context, _one_error():
            ocp.partial.save(
                self._path, {name: leaf.reshape(self._shapes[name]) for name, leaf in leaves.items()}
            )

    def finish(self) -> None:
        """Makes the checkpoint whole."""
        import orbax.checkpoint.experimental.v1 as ocp

        with _one_error():
            ocp.partial.finalize(self._path)


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Keeps a failed write to the one exception that is raised.

    orbax also logs it with tracebacks from every thread it passes; and tensorstore's threads go on to call
    back into an event loop that orbax has closed by then, each time reported to stderr. As those calls come
    late, after a failure their reports stay switched off.
    """
    logger, report_unraisable = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def without_closed_loops(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            report_unraisable(unraisable)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = without_closed_loops
    try:
        yield
        sys.unraisablehook = report_unraisable
    except ValueError as error:  # tensorstore's word for anything that the operating system refused
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    finally:
        logger.setLevel(level)
