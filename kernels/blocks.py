"""How the positions of a sequence are dealt to devices: in blocks, round and round.

Position p lies on device (p // size) % count, there in slot (p // size) // count * size + p % size. Every device then holds
the same share of a sequence at every moment, whatever its length, and the slots below any position are its first ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_LONGEST_ROUND = (
    1024  # positions; blocks of 1,024 / count are whole key tiles of every kernel up to eight devices
)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """`size` consecutive positions to each of `count` devices in turn. Its functions take ints and arrays alike."""

    size: int
    count: int

    @classmethod
    def fitting(cls, count: int, chunk_len: int | None) -> Blocks:
        """The largest blocks of a power of two whose round over `count` devices is at most 1,024 and divides `chunk_len`.

        Raises:
            ValueError: count does not divide chunk_len.
        """
        if chunk_len and chunk_len % count:
            raise ValueError(f"{count} devices do not divide {chunk_len} positions")
        size = 1
        while 2 * size * count <= _LONGEST_ROUND and not (chunk_len and chunk_len % (2 * size * count)):
            size *= 2
        return cls(size, count)

    @property
    def round(self) -> int:
        """Positions after which the first device has its turn again."""
        return self.size * self.count

    def owner(self, position: Any) -> Any:
        """The device that holds an absolute position."""
        return position // self.size % self.count

    def slot(self, position: Any) -> Any:
        """Where its owner holds an absolute position."""
        return position // self.round * self.size + position % self.size

    def position(self, slot: Any, rank: Any) -> Any:
        """The absolute position in a slot of device `rank`."""
        return slot // self.size * self.round + rank * self.size + slot % self.size

    def below(self, position: Any, rank: Any) -> Any:
        """How many slots of device `rank` hold positions below this one: slots 0 to that many - 1."""
        rest = position % self.round - rank * self.size
        return position // self.round * self.size + jnp.clip(rest, 0, self.size)

    def deal(self, x: jax.Array, axis: int) -> jax.Array:
        """Whole rounds of positions along `axis`, put in the order of the devices that own them."""
        return self._reorder(x, axis, (-1, self.count, self.size))

    def undeal(self, x: jax.Array, axis: int) -> jax.Array:
        """Back in the order of positions."""
        return self._reorder(x, axis, (self.count, -1, self.size))

    def dealt(self, t: Any, rows: int) -> Any:
        """Where `deal` puts entry t of `rows`."""
        return self.owner(t) * (rows // self.count) + self.slot(t)

    def _reorder(self, x: jax.Array, axis: int, parts: tuple[int, int, int]) -> jax.Array:
        apart = x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :])
        return jnp.swapaxes(apart, axis, axis + 1).reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class Share:
    """The positions that one device of several holds; a pytree, of which only `rank` is an array.

    Attributes:
        blocks: how positions are dealt.
        rank: int32 scalar, which of the devices this is.
        axis: the mesh axis over which the devices can meet, inside `jax.shard_map`; None where they cannot.
    """

    blocks: Blocks
    rank: jax.Array | int
    axis: str | None = None

    @classmethod
    def here(cls, blocks: Blocks, axis: str) -> Share:
        """That of the device which runs this; inside `jax.shard_map` only."""
        return cls(blocks, lax.axis_index(axis), axis)

    def position(self, slot: Any) -> Any:
        """See `Blocks.position`."""
        return self.blocks.position(slot, self.rank)

    def below(self, position: Any) -> Any:
        """See `Blocks.below`."""
        return self.blocks.below(position, self.rank)

    def capacity(self, slots: int) -> int:
        """Positions that the devices hold together when each has this many slots."""
        return slots * self.blocks.count


jax.tree_util.register_dataclass(Share, data_fields=["rank"], meta_fields=["blocks", "axis"])

EVERYTHING = Share(Blocks(1 << 30, 1), 0)
"""The share of a device that is alone, one block: slot and position are the same."""
