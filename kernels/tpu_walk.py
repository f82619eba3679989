"""Flash attention over a list of key tiles, in Pallas Mosaic TPU: one query tile, one running softmax.

Scores stand keys x rows. Then maximum and sum run over sublanes (a vector operation an element, where lanes would need the
transpose unit), a row's numbers are lanes of one vector, and the weights P enter the second product as its stationary
operand: contraction over keys and columns of queries both fill a 256-wide matrix unit, where the values' head of 128 would
fill half of it.

The walk is a pipeline of two steps in every basic block: scores and maximum of the next sub-block of keys, beside softmax
and second product of the one before. Neither waits for the other, so the compiler interleaves the matrix unit's work with the
vector units'. Scores cross from one step to the next in two scratch buffers, which take turns.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.tpu import LN2, NOTHING_YET

KEY_SLOTS = (
    3  # the tile whose scores are used up, the one whose scores are begun, the one that is being copied
)
_VALUE_SLOTS = 2


@dataclasses.dataclass(frozen=True)
class WalkShape:
    """Static sizes of a walk: `rows` of the query tile, `block_kv` keys a row and tile in sub-blocks of `block_compute`.

    buffer: keys that are copied a tile, at most; more than block_kv where rows see different ones.
    flat: whether tiles hold keys along lanes, [H, keys] (`tpu.flat`).
    """

    rows: int
    block_kv: int
    block_compute: int
    head_dim: int
    buffer: int
    flat: bool = False

    @property
    def subs(self) -> int:
        """Sub-blocks of a key tile; even, so that each has its buffer of scores."""
        return self.block_kv // self.block_compute

    def scratch(self, dtype: Any) -> list[Any]:
        """What `Scratch` takes, in its order."""
        tile, scores = (self.buffer, self.head_dim), (self.block_compute, self.rows)
        tile = tile[::-1] if self.flat else tile
        return [
            pltpu.VMEM((KEY_SLOTS, *tile), dtype),
            pltpu.VMEM((_VALUE_SLOTS, *tile), dtype),
            pltpu.VMEM(scores, jnp.float32),
            pltpu.VMEM(scores, jnp.float32),
            pltpu.VMEM((self.head_dim, self.rows), jnp.float32),
            pltpu.VMEM((1, self.rows), jnp.float32),
            pltpu.VMEM((1, self.rows), jnp.float32),
            pltpu.SemaphoreType.DMA((KEY_SLOTS,)),
            pltpu.SemaphoreType.DMA((_VALUE_SLOTS,)),
        ]


@dataclasses.dataclass(frozen=True)
class Scratch:
    """References to a walk's scratch: rings of tiles, two buffers of scores [keys, rows], the running softmax."""

    k: Any
    v: Any
    scores_0: Any
    scores_1: Any
    out: Any  # float32[H, rows]
    peak: Any  # float32[1, rows]
    total: Any  # float32[1, rows]
    k_arrived: Any
    v_arrived: Any


class Copy(Protocol):
    """Bytes on their way into a tile; all of them have the same way."""

    def start(self) -> None: ...

    def wait(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Walk:
    """One query tile against key tiles 0 .. n - 1, each of one kind; kind 0 is what every tile may be taken for.

    Attributes:
        shape: static sizes.
        scratch: of this walk.
        copy: copy(n, keys, destination, semaphore, kind) -> the copy of tile n's keys (or values), not started; the tile may be
            of any kind where `kind` is 0.
        score: score(n, i, keys, kind) -> scores [block_compute, rows] of sub-block i of tile n, whose keys are given (a
            reference); exponents of base 2. The same scores in the same places, whatever the kind.
        weigh: weigh(n, i, values, p, kind) -> [H, rows], the values of that sub-block weighted by p, float32[block_compute,
            rows].
        kinds: how many there are; a loop body is made for each.
    """

    shape: WalkShape
    scratch: Scratch
    copy: Callable[[jax.Array, bool, Any, Any, int], Copy]
    score: Callable[[jax.Array, int, Any, int], jax.Array]
    weigh: Callable[[jax.Array, int, Any, jax.Array, int], jax.Array]
    kinds: int = 1

    def reset(self) -> None:
        """An empty softmax. Walks with the same scratch go on from one another's."""
        s = self.scratch
        s.peak[...] = jnp.full_like(s.peak, NOTHING_YET)
        s.total[...] = jnp.zeros_like(s.total)
        s.out[...] = jnp.zeros_like(s.out)

    def __call__(self, tiles: jax.Array, kind: Callable[[jax.Array], jax.Array]) -> None:
        """Adds tiles [0, tiles) to the softmax in the scratch; kind(n): of tile n, int32, of which it may be that there is
        none."""

        @pl.when(tiles > 0)
        def _() -> None:
            self._keys(jnp.int32(0), 0).start()
            self._values(jnp.int32(0), 0).start()

            @pl.when(tiles > 1)
            def _() -> None:
                self._keys(jnp.int32(1), 0).start()

            self._keys(jnp.int32(0), 0).wait()

            def visit(n: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
                """carry: the maximum of tile n's first scores, the kinds of tiles n and n + 1."""
                peak, here, coming = carry

                @pl.when(n + 2 < tiles)
                def _() -> None:
                    self._keys(n + 2, 0).start()

                def body(k: int, peak: jax.Array) -> tuple[jax.Array, jax.Array]:
                    return self._visit(n, peak, k), kind(n + 2)  # found beside the vector units' work

                bodies = [functools.partial(body, k) for k in range(self.kinds)]
                # A visit scores the beginning of the next tile.
                chosen = jnp.where(here == coming, here, 0)
                peak, then = lax.switch(chosen, bodies, peak) if self.kinds > 1 else bodies[0](peak)
                return peak, coming, then

            start = self._score(jnp.int32(0), 0, 0), kind(jnp.int32(0)), kind(jnp.int32(1))
            peak, *_ = lax.fori_loop(0, tiles - 1, visit, start)
            self._values(tiles - 1, 0).wait()
            self._sub_blocks(tiles - 1, peak, 0, last=True)

    def natural_lse(self) -> jax.Array:
        """float32[1, rows] of the walk that has ended; -inf for a row that saw no key."""
        s = self.scratch
        return (s.peak[...] + jnp.log2(s.total[...])) * LN2

    def normalised(self) -> jax.Array:
        """Output float32[rows, H] of the walk that has ended; 0 for a row that saw no key."""
        total = self.scratch.total[...]
        return (self.scratch.out[...] / jnp.where(total == 0, 1.0, total)).T

    def _visit(self, n: jax.Array, peak: jax.Array, kind: int) -> jax.Array:
        """Tile n, which is not the last. `peak`: the maximum of its first sub-block's scores, [1, rows]; returns the next's."""
        self._keys(n + 1, kind).wait()
        self._values(n, kind).wait()
        self._values(n + 1, kind).start()
        return self._sub_blocks(n, peak, kind, last=False)

    def _sub_blocks(self, n: jax.Array, peak: jax.Array, kind: int, *, last: bool) -> jax.Array:
        for i in range(self.shape.subs):
            if i + 1 < self.shape.subs:
                coming = self._score(n, i + 1, kind)
            elif not last:
                coming = self._score(n + 1, 0, kind)
            self._add(n, i, peak, kind)
            peak = coming
        return peak

    def _score(self, n: jax.Array, i: int, kind: int) -> jax.Array:
        """Scores of sub-block i of tile n into its buffer; returns their maximum by row, [1, rows]."""
        s_SR = self.score(n, i, self.scratch.k.at[lax.rem(n, KEY_SLOTS)], kind)
        self._buffer(i)[...] = s_SR
        return s_SR.max(axis=0, keepdims=True)

    def _add(self, n: jax.Array, i: int, peak: jax.Array, kind: int) -> None:
        """Sub-block i of tile n, whose scores have this maximum, into the running softmax."""
        s = self.scratch
        old = s.peak[...]
        new = jnp.maximum(old, peak)
        shrink = jnp.exp2(old - new)
        p_SR = jnp.exp2(self._buffer(i)[...] - new)
        s.peak[...] = new
        s.total[...] = s.total[...] * shrink + p_SR.sum(axis=0, keepdims=True)
        weighed = self.weigh(n, i, s.v.at[lax.rem(n, _VALUE_SLOTS)], p_SR, kind)
        s.out[...] = s.out[...] * shrink + weighed

    def _buffer(self, i: int) -> Any:
        return self.scratch.scores_1 if i % 2 else self.scratch.scores_0

    def _keys(self, n: jax.Array, kind: int) -> Copy:
        slot = lax.rem(n, KEY_SLOTS)
        return self.copy(n, True, self.scratch.k.at[slot], self.scratch.k_arrived.at[slot], kind)

    def _values(self, n: jax.Array, kind: int) -> Copy:
        slot = lax.rem(n, _VALUE_SLOTS)
        return self.copy(n, False, self.scratch.v.at[slot], self.scratch.v_arrived.at[slot], kind)


def product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Matrix product over these axes, accumulated in float32."""
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
