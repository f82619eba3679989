"""The safetensors format, read by byte range and written as a stream.

A file is 8 bytes of header length (little endian), a JSON header {name: {dtype, shape, data_offsets}}, and
the tensors' bytes back to back in C order. The safetensors library reads through a memory map, whose pages
count as memory of the process, and writes only what it is given whole; neither will do for a checkpoint
larger than memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from qwen_jax.convert.parallel import cuts, in_parallel
from qwen_jax.convert.source import Box, box_shape
from qwen_jax.errors import CheckpointError

TAGS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "I8": "int8", "F8_E4M3": "float8_e4m3fn"}
_DTYPES = {tag: np.dtype(getattr(ml_dtypes, name, name)) for tag, name in TAGS.items()}
_TAG_OF = {dtype: tag for tag, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library
_HEADER_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` from byte `start` of `file`; `tag` is the file's dtype, "BF16" say."""

    name: str
    file: Path
    tag: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads and checks a file's header: every byte after it must belong to exactly one tensor.

    Raises:
        CheckpointError: not a safetensors file, truncated, or tensors that overlap, leave gaps or appear
        twice.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(f"{file.name} is truncated: {size} bytes do not hold its header")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{file.name} is not a safetensors file: a header of {length} bytes")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise CheckpointError(f"{file.name} is not a safetensors file: its header is not JSON") from None
    except _DuplicateError as error:
        raise CheckpointError(f"{file.name} names {error} twice in its header") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name} is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    infos = [_info(file, name, entry, 8 + length) for name, entry in header.items()]
    _require_packed(file, infos, 8 + length, size)
    return {info.name: info for info in infos}


class _DuplicateError(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateError(key)
        result[key] = value
    return result


def _info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    try:
        tag, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        if not isinstance(tag, str) or not all(type(n) is int and n >= 0 for n in numbers) or end < begin:
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{file.name}: the header's entry for {name} is malformed") from None
    if tag in TAGS and math.prod(shape) * _DTYPES[tag].itemsize != end - begin:
        raise CheckpointError(
            f"{file.name}: {name} is {tag} {shape} but {end - begin} bytes are set aside for it"
        )
    return TensorInfo(name, file, tag, tuple(shape), data_start + begin, end - begin)


def _require_packed(file: Path, infos: Sequence[TensorInfo], data_start: int, size: int) -> None:
    position = data_start
    for info in sorted(infos, key=lambda i: (i.start, i.nbytes)):
        if info.start != position:
            fault = "overlaps another tensor" if info.start < position else "leaves a gap before it"
            raise CheckpointError(f"{file.name}: {info.name} {fault}")
        position += info.nbytes
    if size < position:
        raise CheckpointError(f"{file.name} is truncated: {size} bytes where its header promises {position}")
    if size > position:
        raise CheckpointError(f"{file.name} has {size - position} bytes after its last tensor")


def byte_runs(shape: Sequence[int], itemsize: int, box: Box) -> Iterator[tuple[int, int]]:
    """The byte ranges (offset, length) that hold `box` of a C-ordered array, in the box's own C order."""
    extents = box_shape(box)
    if math.prod(extents) == 0:
        return
    # Trailing dimensions taken whole join the run of the dimension before them.
    inner = len(shape)
    while inner > 0 and extents[inner - 1] == shape[inner - 1]:
        inner -= 1
    run_dim = max(inner - 1, 0)
    strides = [itemsize * math.prod(shape[d + 1 :]) for d in range(len(shape))]
    length = itemsize * math.prod(extents[run_dim:])
    tail = box[run_dim][0] * strides[run_dim] if shape else 0
    for outer in itertools.product(*(range(*bounds) for bounds in box[:run_dim])):
        yield tail + sum(i * stride for i, stride in zip(outer, strides, strict=False)), length


def read_box(info: TensorInfo, shape: Sequence[int], box: Box, out: np.ndarray | None = None) -> np.ndarray:
    """Reads `box` of a tensor seen as `shape` (same bytes, other axes), touching only the bytes that hold it.

    Args:
        out: a C-ordered array of the box's shape and the tensor's dtype to fill and return; None: a fresh one.

    Raises:
        CheckpointError: the file ends early or cannot be read.
    """
    dtype = _DTYPES[info.tag]
    array = np.empty(box_shape(box), dtype) if out is None else out
    target = memoryview(array.reshape(-1).view(np.uint8)) if array.size else memoryview(b"")
    try:
        descriptor = os.open(info.file, os.O_RDONLY)
        try:

            def fill(pieces: list[tuple[int, int, int]]) -> None:
                for begin, length, offset in pieces:
                    _read_exactly(descriptor, target[begin : begin + length], info.start + offset)

            in_parallel(fill, _shares(shape, dtype.itemsize, box))
        finally:
            os.close(descriptor)
    except EOFError:
        raise CheckpointError(f"{info.file} is truncated inside tensor {info.name}") from None
    except OSError as error:
        raise CheckpointError(f"{info.file} cannot be read: {error.strerror}") from None
    return array


def _shares(shape: Sequence[int], itemsize: int, box: Box) -> list[list[tuple[int, int, int]]]:
    """The byte runs of a box as (start in the box, length, offset), cut and grouped into pieces of work of some size."""
    runs = [
        (n * length, length, offset) for n, (offset, length) in enumerate(byte_runs(shape, itemsize, box))
    ]
    if len(runs) == 1:
        ((_, length, offset),) = runs
        return [[(start, stop - start, offset + start)] for start, stop in cuts(length)]
    return [runs[start:stop] for start, stop in cuts(len(runs), runs[0][1])] if runs else []


def _read_exactly(descriptor: int, target: memoryview, offset: int) -> None:
    while len(target):
        count = os.preadv(descriptor, [target], offset)  # one call moves at most 2 GB
        if count == 0:
            raise EOFError
        target, offset = target[count:], offset + count


class SafetensorsWriter:
    """Writes one file tensor by tensor: the header comes first, as all names and shapes are known beforehand.

    Args:
        file: the file to create.
        shapes: shape by name, in the order in which the tensors will be written.
        dtype: dtype of all of them.
    """

    def __init__(self, file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> None:
        self._pending = iter(shapes.items())
        self._dtype = dtype
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this
        position = 0
        for name, shape in shapes.items():
            end = position + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _TAG_OF[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _HEADER_ALIGNMENT)
        self._stream: BinaryIO = file.open("xb")
        self._stream.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, array: np.ndarray) -> None:
        """Appends the next tensor."""
        expected = next(self._pending)
        if (name, array.shape, array.dtype) != (*expected, self._dtype):
            raise ValueError(f"expected {expected}, got {name} {array.shape} {array.dtype}")
        self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                if next(self._pending, None) is not None:
                    raise ValueError("closed before its last tensor was written")
                self._stream.flush()
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
