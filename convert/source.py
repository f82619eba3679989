"""`TensorSource`: a checked checkpoint folder that hands out slices of its tensors, whatever the format."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.convert.parallel import cuts, in_parallel
from qwen_jax.errors import CheckpointError
from qwen_jax.params import LAYERS, Param, params

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) as a checkpoint is read or written."""

DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

_BLOCK_BYTES = 1 << 20  # looked at twice in a row: the second time in the processor's cache
_PROBLEMS_SHOWN = 5


class TensorSource(abc.ABC):
    """A checkpoint folder whose names, shapes and dtypes have been checked against its config.json.

    Attributes:
        folder: where it lies.
        config: what its config.json says.
        dtype: dtype of every tensor: bfloat16 (ml_dtypes), float16 or float32.
        bytes_read: bytes of tensors read from disk by `read` so far.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        self.config = config
        self.dtype = DTYPES[config.dtype]
        self.bytes_read = 0

    @abc.abstractmethod
    def name(self, param: Param, layer: int | None = None) -> str:
        """The tensor's name in this format, for messages."""

    @abc.abstractmethod
    def _read(self, param: Param, layer: int | None, box: Box, out: np.ndarray | None) -> np.ndarray:
        """Reads `box` of one tensor in the model's shape, adding what it took from disk to `bytes_read`."""

    def read(
        self,
        param: Param,
        layer: int | None = None,
        index: tuple[slice, ...] | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads one tensor, or the part of it that `index` selects, from the bytes that hold it and no
        others.

        Args:
            param: a row of `params(config)`.
            layer: which layer, for stacked rows; None for the others.
            index: one slice of step 1 per dimension of `param.shape(config)`; None for all of it.
            out: a C-ordered array to fill, of the shape and dtype of the result.

        Returns:
            `out`, or a fresh writable array in `dtype`, in the model's shape (no layer axis).

        Raises:
            CheckpointError: the bytes are not there, or hold NaN or infinity.
        """
        array = self._read(param, layer, box_of(index, param.shape(self.config)), out)
        if magnitude(array) >= _infinity(self.dtype):
            raise CheckpointError(
                f"{self.folder}: tensor {self.name(param, layer)} holds NaN or infinity: "
                "the file is damaged or its training diverged; get a fresh copy"
            )
        return array


# A box is one (start, stop) pair per dimension: an index with every None and negative bound resolved.
Box = tuple[tuple[int, int], ...]


def box_of(index: tuple[slice, ...] | None, shape: Sequence[int]) -> Box:
    """Resolves slices of step 1 against a shape."""
    if index is None:
        return tuple((0, size) for size in shape)
    if len(index) != len(shape):
        raise ValueError(f"{len(index)} slices for shape {tuple(shape)}")
    bounds = [s.indices(size) for s, size in zip(index, shape, strict=True)]
    if any(step != 1 for _, _, step in bounds):
        raise ValueError(f"slices must have step 1, got {index}")
    return tuple((start, max(start, stop)) for start, stop, _ in bounds)


def box_shape(box: Box) -> tuple[int, ...]:
    """Extent of a box along each dimension."""
    return tuple(stop - start for start, stop in box)


def tensors(config: ModelConfig) -> Iterator[tuple[Param, int | None]]:
    """Every tensor of a checkpoint in the order it is stored: embedding, layers in turn, final norm, head."""
    rows = params(config)
    first = next(i for i, p in enumerate(rows) if p.stacked)
    stacked = [p for p in rows if p.stacked]
    for p in rows[:first]:
        yield p, None
    for layer in range(config.num_layers):
        for p in stacked:
            yield p, layer
    for p in rows[first:]:
        if not p.stacked:
            yield p, None


def leaf_name(param: Param, layer: int | None) -> str:
    """The name in a converted folder: "layers.attn.q.weight" of layer 3 is "layers.3.attn.q.weight"."""
    return param.path if layer is None else param.path.replace(LAYERS, f"{LAYERS}.{layer}", 1)


def tensor_bytes(source: TensorSource, param: Param) -> int:
    """Size of one tensor (of one layer) in the checkpoint."""
    return math.prod(param.shape(source.config)) * source.dtype.itemsize


def in_groups(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Cuts names into consecutive groups of at most `limit` bytes; a larger one gets a group of its own.

    Args:
        sizes: bytes by name, in the order to keep.
        limit: most bytes in a group.
    """
    groups: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def magnitude(array: np.ndarray) -> int:
    """Bit pattern of the largest absolute value: patterns order as the values do, infinity and NaN last."""
    sign = 1 << (8 * array.itemsize - 1)
    flat = array.reshape(-1)
    unsigned, signed = (flat.view(np.dtype(f"{kind}{array.itemsize}")) for kind in "ui")

    def largest(bounds: tuple[int, int]) -> int:
        # The largest pattern as an unsigned number is that of the largest negative value, if there is one.
        step, found = _BLOCK_BYTES // array.itemsize, 0
        for start in range(*bounds, step):
            block = slice(start, min(start + step, bounds[1]))
            negative = int(unsigned[block].max())
            found = max(found, int(signed[block].max()), negative - sign)
        return found

    return max(in_parallel(largest, cuts(flat.size, array.itemsize)), default=0)


def _infinity(dtype: np.dtype) -> int:
    return magnitude(np.array([np.inf], dtype))


def report(folder: Path, problems: Sequence[str]) -> None:
    """Raises one CheckpointError naming every problem (the first few in full), if there are any."""
    if not problems:
        return
    shown = "; ".join(problems[:_PROBLEMS_SHOWN])
    more = len(problems) - _PROBLEMS_SHOWN
    raise CheckpointError(f"{folder}: {shown}" + (f"; and {more} more problems" if more > 0 else ""))


def summarise(names: Sequence[str]) -> str:
    """ "a, b, c and 9 more": a list of names short enough for one line."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
