"""Mesh axes, and the one table that says which dimension is split over which of them.

data      independent sequences
context   positions of one sequence
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
    T: str | None = None
    S: str | None = None
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


def check_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Refuses a tensor axis that does not divide the model, and names a mesh of the same devices that works.

    Raises:
        QwenJaxError: as said.
    """
    shape = {axis: mesh.shape.get(axis, 1) for axis in AXES}
    tensor, sizes = shape[TENSOR], config.sizes()
    undivided = [f"{name}={sizes[letter]}" for letter, name in _SPLIT.items() if sizes[letter] % tensor]
    if undivided:
        works = math.gcd(tensor, widest_tensor(config))
        context = shape[CONTEXT] * tensor // works
        raise QwenJaxError(
            f"tensor={tensor} does not divide {', '.join(undivided)}: "
            f"use a mesh with context={context},tensor={works}"
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
