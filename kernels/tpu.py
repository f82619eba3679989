"""What the TPU kernels share: which TPU programs are compiled for, and the constants of a base-2 softmax."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from qwen_jax.kernels.blocks import Blocks

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
MASKED = -1e30  # score of a key that is not seen: finite, so that differences of two are
NOTHING_YET = (
    MASKED / 2
)  # running maximum before any key: above MASKED, so that a masked key weighs exp2(-5e29) = 0
LANES = 128  # a row of a vector register, and the tile width of an array in memory
SUBLANES_BF16 = 16  # rows of a bfloat16 tile
SUBLANES_INT8 = 32  # rows of a tile of bytes

_GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}


def positions(slot: jax.Array, blocks: Blocks | None, rank: jax.Array) -> jax.Array:
    """`Blocks.position` for a kernel: without divisions, which TPUs lack; slots are positions where there are no blocks."""
    if blocks is None:
        return slot
    shift = blocks.size.bit_length() - 1
    return (slot >> shift) * blocks.round + rank * blocks.size + (slot & (blocks.size - 1))


def flat(head_dim: int) -> bool:
    """Whether keys and values of this head lie along lanes, [.., H, S]: so XLA lays out a cache whose last dimension would
    fill its row of lanes in part only, and a kernel that wants another layout gets a copy of the cache."""
    return head_dim < LANES


def as_it_lies(x_LBKSH: jax.Array) -> jax.Array:
    """Keys or values with their dimensions in the order of memory: no copy (`flat`)."""
    return jnp.swapaxes(x_LBKSH, 3, 4) if flat(x_LBKSH.shape[4]) else x_LBKSH


def alignment(head_dim: int) -> int:
    """Copies of bfloat16 keys start and end at multiples of so many."""
    return LANES if flat(head_dim) else SUBLANES_BF16


def target() -> str:
    """The kind of device that programs are compiled for: that of the mesh in context (which may be of devices that are not
    attached), else the first device's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def generation(device_kind: str) -> str | None:
    """v5e, v5p, v6e or tpu7x; None for anything else."""
    return _GENERATIONS.get(device_kind)


def why_not_tpu() -> str | None:
    """Why programs are not compiled for a TPU that these kernels were compiled for, or None."""
    kind = target()
    if generation(kind):
        return None
    if kind.startswith("TPU"):
        return f"runs on TPU v5e, v5p, v6e and tpu7x, not on {kind}"
    return f"runs on TPUs, not on a {kind}"
