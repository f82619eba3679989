"""What a decode call is to the Hopper kernels, and how the keys of its rows are dealt to walks that run side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.blocks import Blocks
from qwen_jax.kernels.hopper import Held, multiprocessors


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What can be tuned.

    Attributes:
        block_kv: keys a tile.
        stages: tiles of keys, and of values, that the ring of a walk holds.
        walks: shares that a multiprocessor walks side by side: as many blocks, or with an 8-bit cache warpgroups of one block.
    """

    block_kv: int = 128
    stages: int = 2
    walks: int = 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call; versions = rotations of the queries: 3 with dual chunk attention, else 1.

    cache: dtype of the values, and of 8-bit keys. original: L0 of the length temperature, tokens; 0 for none. blocks: how
    positions are dealt to several devices, of which this one's are in the cache; None: all are.
    """

    versions: int
    batch: int
    heads: int
    kv_heads: int
    capacity: int
    head_dim: int
    original: int = 0
    cache: str = "bfloat16"
    blocks: Blocks | None = None

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def pairs(self) -> int:
        """Pairs of a batch row and a KV head."""
        return self.batch * self.kv_heads

    @property
    def quantised(self) -> bool:
        """Whether the cache holds 8-bit numbers with a factor a token and head."""
        return jnp.dtype(self.cache).itemsize == 1


def shares(problem: Problem, tiling: Tiling) -> int:
    """Into how many shares the keys of a pair are split: as few as leave at most 5% of the walks idle."""
    pairs, walks = problem.pairs, multiprocessors() * tiling.walks
    most = max(1, min(pl.cdiv(problem.capacity, tiling.block_kv), 2 * walks // pairs))

    def busy(n: int) -> float:
        return pairs * n / (walks * pl.cdiv(pairs * n, walks))

    return next((n for n in range(1, most + 1) if busy(n) >= 0.95), max(range(1, most + 1), key=busy))


@dataclasses.dataclass(frozen=True)
class Split:
    """The shares inside a kernel; shares of a pair are consecutive.

    Attributes:
        rows: int32[4 B] in memory, for each batch row its position, prompt length, slots of the first SUCC and INTRA key.
        walks: how many there are in all.
    """

    problem: Problem
    tiling: Tiling
    held: Held
    rows: Any
    walks: int

    @property
    def shares(self) -> int:
        return shares(self.problem, self.tiling)

    @property
    def items(self) -> int:
        """Shares of all pairs."""
        return self.problem.pairs * self.shares

    def run(self, walk: jax.Array, body: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
        """body(share, carry) -> carry for every share of a walk; the carry is an int32, 0 at first."""
        rounds = lax.div(self.items - walk + (self.walks - 1), jnp.int32(self.walks))
        lax.fori_loop(0, rounds, lambda r, done: body(r * self.walks + walk, done), jnp.int32(0))

    def item(self, n: jax.Array) -> tuple[jax.Array, ...]:
        """(batch row, its pair, first tile, end tile) of share n; the end may be the first."""
        keys = self.tiling.block_kv
        pair = lax.div(n, self.shares)
        b = lax.div(pair, self.problem.kv_heads)
        tiles = lax.div(self.held.below(self.rows[4 * b] + 1) + (keys - 1), keys)
        share = lax.rem(n, self.shares)
        # In this order no product passes int32 for the cache sizes a GPU holds.
        return b, pair, lax.div(tiles * share, self.shares), lax.div(tiles * (share + 1), self.shares)

    def stage_tiles(self, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tiles [0, succ) of a row are INTER, [succ, intra) SUCC, the rest INTRA."""
        keys = self.tiling.block_kv
        return lax.div(self.rows[4 * b + 2], keys), lax.div(self.rows[4 * b + 3], keys)
