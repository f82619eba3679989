"""Mesh axes, and the one table that says which dimension is split over which of them.

data      independent sequences
context   positions of one sequence, dealt out in blocks (`kernels.blocks`)
tensor    heads, MLP width, vocabulary
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen_jax.config import ModelConfig
from qwen_jax.errors import QwenJaxError
from qwen_jax.kernels.blocks import Blocks
from qwen_jax.params import params

AXES = ("data", "context", "tensor")
DATA, CONTEXT, TENSOR = AXES

# Letters that `tensor` splits, with the name config.json gives their size.
_SPLIT = {
    "N": "num_attention_heads",
    "K": "num_key_value_heads",
    "F": "intermediate_size",
    "V": "vocab_size",
}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axis by dimension letter; None: every device holds the whole dimension."""

    B: str | None = DATA
    T: str | None = CONTEXT
    S: str | None = CONTEXT
    D: str | None = None
    F: str | None = TENSOR
    N: str | None = TENSOR
    K: str | None = TENSOR
    G: str | None = None
    H: str | None = None
    V: str | None = TENSOR
    L: str | None = None

    def spec(self, letters: str) -> PartitionSpec:
        """The partition of an array whose dimensions are these letters: spec("LBKSH") for a cache."""
        return PartitionSpec(*(getattr(self, letter) for letter in letters))

    def tensor_axis(self, letters: str) -> int | None:
        """Which of these dimensions the tensor axis splits; None if none."""
        split = [i for i, letter in enumerate(letters) if getattr(self, letter) == TENSOR]
        return split[0] if split else None


def widest_tensor(config: ModelConfig) -> int:
    """The largest size of the tensor axis this model can be split over; the sizes that work divide it."""
    sizes = config.sizes()
    return math.gcd(*(sizes[letter] for letter in _SPLIT))


def full_mesh(mesh: Mesh | None = None) -> Mesh:
    """The mesh with all of `AXES`: missing ones are added with size 1, and every axis is of type Auto.

    Args:
        mesh: any mesh with axes among `AXES`, in any order. None: the one set by `jax.set_mesh`, or else one
        device.

    Raises:
        QwenJaxError: an axis of another name and more than one device.
    """
    if mesh is None:
        current = jax.sharding.get_mesh()
        mesh = Mesh(np.array(jax.local_devices()[:1]), (TENSOR,)) if current.empty else current
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    unknown = [str(name) for name, size in sizes.items() if name not in AXES and size > 1]
    if unknown:
        raise QwenJaxError(f"mesh axis {', '.join(unknown)} is not one of {', '.join(AXES)}: rename it")
    order = [mesh.axis_names.index(name) for name in AXES if name in sizes]
    order += [i for i in range(len(sizes)) if i not in order]  # foreign axes of size 1
    devices = mesh.devices.transpose(order).reshape([sizes.get(name, 1) for name in AXES])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of(array: jax.Array) -> Mesh | None:
    """The mesh that an array lies on, for others to be placed beside it; None if it was placed without one."""
    mesh = getattr(array.sharding, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Refuses a tensor axis that does not divide the model or a context axis that does not divide the chunk length s of dual
    chunk attention, and names a mesh of the same devices that works.

    Raises:
        QwenJaxError: as said.
    """
    shape = {axis: mesh.shape.get(axis, 1) for axis in AXES}
    tensor, sizes = shape[TENSOR], config.sizes()
    undivided = [f"{name}={sizes[letter]}" for letter, name in _SPLIT.items() if sizes[letter] % tensor]
    if undivided:
        works = math.gcd(tensor, widest_tensor(config))
        raise QwenJaxError(
            f"tensor={tensor} does not divide {', '.join(undivided)}: "
            f"use a mesh with {_works(config, shape[CONTEXT] * tensor // works, works)}"
        )
    s = config.dual_chunk.chunk_len if config.dual_chunk else 0
    if s % shape[CONTEXT]:
        raise QwenJaxError(
            f"context={shape[CONTEXT]} does not divide the chunk length {s} of dual chunk attention: "
            f"use a mesh with {_works(config, shape[CONTEXT], tensor)}"
        )


def _works(config: ModelConfig, context: int, tensor: int) -> str:
    """A mesh of context * tensor devices: what s of dual chunk attention leaves over goes to the axis data."""
    fits = math.gcd(context, config.dual_chunk.chunk_len) if config.dual_chunk else context
    rest = f"{DATA}={context // fits}," if fits < context else ""
    return f"{rest}{CONTEXT}={fits},{TENSOR}={tensor}"


def blocks_on(config: ModelConfig, mesh: Mesh) -> Blocks | None:
    """How positions are dealt over the context axis of a mesh; None if that has one device.

    Raises:
        QwenJaxError: as `check_mesh`.
    """
    check_mesh(config, mesh)
    count = mesh.shape.get(CONTEXT, 1)
    return (
        Blocks.fitting(count, config.dual_chunk.chunk_len if config.dual_chunk else None)
        if count > 1
        else None
    )


def shardings(
    config: ModelConfig, mesh: Mesh, rules: ShardingRules | None = None
) -> dict[str, NamedSharding]:
    """Where each parameter lies, by `Param.path`; stacked rows have the layer axis L in front.

    Args:
        mesh: as `full_mesh` returns it.

    Raises:
        QwenJaxError: the mesh does not divide the model.
    """
    check_mesh(config, mesh)
    rules = rules or ShardingRules()
    letters = {p.path: ("L" if p.stacked else "") + p.letters for p in params(config)}
    return {path: NamedSharding(mesh, rules.spec(dims)) for path, dims in letters.items()}
