"""The loop that the Hopper kernels share: one warpgroup, 64 query rows, one running softmax over a range of key tiles.

It works one tile behind itself, as FlashAttention-3 does (arXiv 2407.08608): step j issues S = Q K_j^T and O += P_{j-1} V_{j-1}
together and takes the softmax of S while its own second product, and the other warpgroups' products, run. What counts is what
stands between S and the next product: queries come scaled, or one multiply-add scales S and takes the maximum off; S's
accumulator needs no filling; exponentials start at once, for the maximum moves only when their sums say that it must
(`hopper_rows.exponentials`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.hopper import Ring
from qwen_jax.kernels.hopper_rows import COLUMN, LAYOUT, PARTS, ROW, exponentials, scale_rows, scores

__all__ = ["COLUMN", "ROW", "ROWS", "Softmax", "Walk"]

ROWS = 64  # query rows of one warpgroup: the M of a wgmma
_LN2 = 0.6931471805599453


class Softmax(NamedTuple):
    """What a walk leaves: acc [ROWS, H] = sum of exp2(x - m) v; m near the maximum and l = sum of exp2(x - m), [ROWS]."""

    acc: jax.Array
    m: jax.Array
    l: jax.Array

    def normalised(self) -> tuple[jax.Array, jax.Array]:
        """(out [ROWS, H], lse [ROWS] natural), float32; 0 and -inf for a row that saw no key."""
        share = jnp.where(self.l > 0, 1 / self.l, 0.0)
        out = self.acc * lax.broadcast_in_dim(share, self.acc.shape, [0])
        return out, (self.m + jnp.log2(self.l)) * _LN2


@dataclasses.dataclass(frozen=True)
class Walk:
    """The parts of the loop that do not change between work items.

    Attributes:
        q: this warpgroup's queries in shared memory, [ROWS, H].
        keys, values: the rings of tiles [keys a tile, H].
        before_step: called with each tile index before the tile meets the queries (switches rotations).
        after_keys: called once the queries have been read for the last time.
        visible: (s [ROWS, keys], tile index) -> s with -inf where a key is invisible; only used on masked tiles.
        bias: tile index -> [keys], a number to add to the exponents of every row, on masked tiles but the first; then `visible`
            serves the first alone. Where it can be said so, it costs far less.
        factor: float32 scalar, positive: factor * q . k is a base-2 exponent. None: q . k is, for queries come scaled, which
            moves channels that hardly turn off the numbers they came as.
        interpret: under jax's GPU interpreter, which knows neither stores to an accumulator nor P in registers.
    """

    q: Any
    keys: Ring
    values: Ring
    before_step: Callable[[jax.Array], None]
    after_keys: Callable[[], None]
    visible: Callable[[jax.Array, jax.Array], jax.Array]
    interpret: bool
    bias: Callable[[jax.Array], jax.Array] | None = None
    factor: jax.Array | None = None

    def __call__(self, lo: jax.Array, full: jax.Array, hi: jax.Array, first: jax.Array) -> Softmax:
        """Tiles lo <= j < hi, at least one; those with lo < j < full need no mask. All int32 scalars.

        first: the ring's count of tile lo.
        """

        def await_keys(j: jax.Array) -> None:
            pl.when(j < hi)(lambda: self.keys.wait(self.keys.slot(first + (j - lo))))

        await_keys(lo)
        state = self._first(lo, first)
        await_keys(lo + 1)

        def step(j: jax.Array, state: Any, masked: bool) -> Any:
            n = first + (j - lo)
            softmax = functools.partial(
                self._softmax, j=j, n=n, visible=None if self.bias or not masked else self.visible,
                bias=self.bias if masked else None,
            )  # fmt: skip
            return self._step(j, n, softmax, lambda: await_keys(j + 1), state)

        state = lax.fori_loop(lo + 1, full, functools.partial(step, masked=False), state)
        state = lax.fori_loop(jnp.maximum(full, lo + 1), hi, functools.partial(step, masked=True), state)
        self.after_keys()
        acc, m, _, l, p = state
        return Softmax(self._last(self.values.slot(first + (hi - lo) - 1), acc, p), m, l.sum(axis=1))

    def _first(self, j: jax.Array, n: jax.Array) -> tuple[jax.Array, ...]:
        """S of the first tile alone, the ring's n-th."""
        slot = self.keys.slot(n)
        s = self._issue_scores(slot)
        s = self._collect_scores(s, wait_n=0)
        head_dim = self.keys.tiles.shape[2]
        m, limit = (plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), ROW) for value in (0, -jnp.inf))
        acc, l = (
            plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), LAYOUT)
            for columns in (head_dim, PARTS)
        )
        m, limit, l, _, p = self._softmax(s, m, limit, l, j, n, visible=self.visible)
        return acc, m, limit, l, p.astype(self.values.tiles.dtype)

    def _step(
        self,
        j: jax.Array,
        n: jax.Array,
        softmax: Callable[..., tuple[jax.Array, ...]],
        await_next: Callable[[], None],
        state: Any,
    ) -> tuple[jax.Array, ...]:
        # Without these barriers the compiler writes registers of a product while products are in flight, which
        # makes it serialise them all (ptxas C7513): the carry is ready before, P is rounded after.
        acc, m, limit, l, p = lax.optimization_barrier(state)
        now, before = self.keys.slot(n), self.values.slot(n - 1)
        self.before_step(j)

        s = self._issue_scores(now)

        def product(o_acc: Any) -> tuple[jax.Array, ...]:
            self._start(o_acc, acc)
            self.values.wait(before)
            self._issue(o_acc, p, before)
            ready = self._collect_scores(s, wait_n=1)
            m_limit_l_alpha_p = lax.optimization_barrier(softmax(ready, m, limit, l))
            # A wait ends a basic block, without which the assembler moves the softmax behind the wait for O.
            await_next()
            return self._collect(o_acc, acc, p, before), *m_limit_l_alpha_p

        head_dim = self.keys.tiles.shape[2]
        acc, m, limit, l, alpha, p = pl.run_scoped(product, plgpu.ACC((ROWS, head_dim), jnp.float32))
        self.values.release(before)
        acc, p = lax.optimization_barrier((acc, p))
        return scale_rows(acc, alpha, self.interpret), m, limit, l, p.astype(self.values.tiles.dtype)

    def _last(self, before: jax.Array, acc: jax.Array, p: jax.Array) -> jax.Array:
        """O of the last tile alone."""
        self.values.wait(before)

        def product(o_acc: Any) -> jax.Array:
            self._start(o_acc, acc)
            self._issue(o_acc, p, before)
            return self._collect(o_acc, acc, p, before)

        acc = pl.run_scoped(product, plgpu.ACC((ROWS, acc.shape[1]), jnp.float32))
        self.values.release(before)
        return acc

    def _softmax(
        self,
        s: jax.Array,
        m: jax.Array,
        limit: jax.Array,
        l: jax.Array,
        j: jax.Array,
        n: jax.Array,
        visible: Callable[[jax.Array, jax.Array], jax.Array] | None,
        bias: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[jax.Array, ...]:
        """`exponentials` of tile n's products, P last, in float32; hands the keys back."""
        slot = self.keys.slot(n)
        if visible:
            s = visible(s, j)
        operands = None if visible else (self.q, self.keys.tiles.at[slot])
        row = bias(j) if bias else None
        p, m, limit, l, alpha = exponentials(s, self.factor, m, limit, l, operands, row, self.interpret)
        self.keys.release(slot)
        return m, limit, l, alpha, p

    # S = Q K^T, of an accumulator that it overwrites.

    def _issue_scores(self, slot: jax.Array) -> jax.Array:
        tile = self.keys.tiles.at[slot]
        if self.interpret:
            return jnp.dot(self.q[...], tile[...].T, preferred_element_type=jnp.float32)
        return scores(self.q, tile)

    def _collect_scores(self, s: jax.Array, wait_n: int) -> jax.Array:
        """S once all but the last wait_n products are done."""
        if not self.interpret:
            plgpu.wgmma_wait(wait_n)
        return lax.optimization_barrier(s)

    # O += P V on an accumulator.

    def _start(self, accumulator: Any, value: jax.Array) -> None:
        if not self.interpret:
            accumulator[...] = value

    def _issue(self, o_acc: Any, p: jax.Array, slot: jax.Array) -> None:
        if not self.interpret:
            plgpu.wgmma(o_acc, p, self.values.tiles.at[slot])

    def _collect(self, o_acc: Any, acc: jax.Array, p: jax.Array, slot: jax.Array) -> jax.Array:
        if not self.interpret:
            return o_acc[...]
        return acc + jnp.dot(p, self.values.tiles[slot], preferred_element_type=jnp.float32)
