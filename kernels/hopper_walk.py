"""The loop that the Hopper kernels share: one warpgroup, 64 query rows, one running softmax over a range of key tiles.

It works one tile behind itself, as FlashAttention-3 does (arXiv 2407.08608): step j issues S = Q K_j^T and O += P_{j-1} V_{j-1}
together and takes the softmax of S while its own second product, and the other warpgroups' products, run. Exponents are base 2.
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

from qwen_jax.kernels.hopper import Ring, Turns

ROWS = 64  # query rows of one warpgroup: the M of a wgmma
LAYOUT = plgpu.Layout.WGMMA
ROW = LAYOUT.reduce(1)  # one value a query row
COLUMN = LAYOUT.reduce(0)  # one value a key
_NOTHING = -1e30  # running maximum before any visible key; finite, so that exp2(x - max) is never NaN


class Softmax(NamedTuple):
    """What a walk leaves: acc [ROWS, H] = sum of exp2(x - m) v, m and l [ROWS] the maximum and the sum of exp2(x - m)."""

    acc: jax.Array
    m: jax.Array
    l: jax.Array

    def normalised(self) -> tuple[jax.Array, jax.Array]:
        """(out [ROWS, H], lse [ROWS] natural), float32; 0 and -inf for a row that saw no key."""
        share = jnp.where(self.l > 0, 1 / self.l, 0.0)
        out = self.acc * lax.broadcast_in_dim(share, self.acc.shape, [0])
        return out, (self.m + jnp.log2(self.l)) * 0.6931471805599453


@dataclasses.dataclass(frozen=True)
class Walk:
    """The parts of the loop that do not change between work items.

    Attributes:
        q: this warpgroup's queries in shared memory, [ROWS, H].
        k, v: the ring's tiles, [stages, keys, H].
        k_full, v_full: barriers of the ring's copies.
        ring: frees slots.
        turns: orders the warpgroups' products, or None for one warpgroup alone.
        before_step: called with each tile index before its keys are read (switches rotations).
        after_keys: called once the queries have been read for the last time.
        visible: (s [ROWS, keys], tile index) -> s with -inf where a key is invisible; only used on masked tiles.
        interpret: under jax's GPU interpreter, which knows neither stores to an accumulator nor P in registers.
    """

    q: Any
    k: Any
    v: Any
    k_full: Any
    v_full: Any
    ring: Ring
    turns: Turns | None
    before_step: Callable[[jax.Array], None]
    after_keys: Callable[[], None]
    visible: Callable[[jax.Array, jax.Array], jax.Array]
    interpret: bool

    def __call__(
        self, lo: jax.Array, full: jax.Array, hi: jax.Array, first: jax.Array, factor: jax.Array
    ) -> Softmax:
        """Tiles lo <= j < hi, at least one; those with lo < j < full need no mask. All int32 scalars.

        first: the ring position of tile lo. factor: float32 scalar > 0 from q . k to exponents.
        """

        def slot(j: jax.Array) -> jax.Array:
            return lax.rem(first + (j - lo), jnp.int32(self.ring.stages))

        state = self._first(lo, slot(lo), factor)

        def step(j: jax.Array, state: Any, masked: bool) -> Any:
            return self._step(j, slot(j), slot(j - 1), factor, masked, state)

        state = lax.fori_loop(lo + 1, full, functools.partial(step, masked=False), state)
        state = lax.fori_loop(jnp.maximum(full, lo + 1), hi, functools.partial(step, masked=True), state)
        self.after_keys()
        acc, m, l, p = state
        return Softmax(self._last(slot(hi - 1), acc, p), m, l)

    def _first(self, j: jax.Array, slot: jax.Array, factor: jax.Array) -> tuple[jax.Array, ...]:
        """S of the first tile alone."""
        keys, H = self.k.shape[1:]
        plgpu.barrier_wait(self.k_full.at[slot])
        self._take_turn()

        def product(s_acc: Any) -> jax.Array:
            plgpu.wgmma(s_acc, self.q, self.k.at[slot].transpose((1, 0)))
            self._give_turn()
            return s_acc[...]

        s = pl.run_scoped(product, plgpu.ACC((ROWS, keys), jnp.float32))
        self.ring.free_key(slot)
        m = plgpu.layout_cast(jnp.full((ROWS,), _NOTHING, jnp.float32), ROW)
        l = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)
        m, l, _, p = self._softmax(s, m, l, j, factor, masked=True)
        return plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), LAYOUT), m, l, p.astype(self.q.dtype)

    def _step(
        self, j: jax.Array, now: jax.Array, before: jax.Array, factor: jax.Array, masked: bool, state: Any
    ) -> tuple[jax.Array, ...]:
        # Without these barriers the compiler writes registers of a product while products are in flight, which
        # makes it serialise them all (ptxas C7513): the carry is ready before, P is rounded after.
        acc, m, l, p = lax.optimization_barrier(state)
        self.before_step(j)
        plgpu.barrier_wait(self.k_full.at[now])
        self._take_turn()

        def products(o_acc: Any, s_acc: Any) -> tuple[jax.Array, ...]:
            self._start(o_acc, acc)
            plgpu.wgmma(s_acc, self.q, self.k.at[now].transpose((1, 0)))
            plgpu.barrier_wait(self.v_full.at[before])
            self._issue(o_acc, p, before)
            self._give_turn()
            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
            self.ring.free_key(now)
            softmax = self._softmax(s, m, l, j, factor, masked)
            return self._collect(o_acc, acc, p, before), *softmax

        keys, head_dim = self.k.shape[1:]
        acc, m, l, alpha, p = pl.run_scoped(
            products, plgpu.ACC((ROWS, head_dim), jnp.float32), plgpu.ACC((ROWS, keys), jnp.float32)
        )
        self.ring.free_value(before)
        acc, p = lax.optimization_barrier((acc, p))
        return acc * lax.broadcast_in_dim(alpha, acc.shape, [0]), m, l, p.astype(self.q.dtype)

    def _last(self, before: jax.Array, acc: jax.Array, p: jax.Array) -> jax.Array:
        """O of the last tile alone."""
        plgpu.barrier_wait(self.v_full.at[before])
        self._take_turn()

        def product(o_acc: Any) -> jax.Array:
            self._start(o_acc, acc)
            self._issue(o_acc, p, before)
            self._give_turn()
            return self._collect(o_acc, acc, p, before)

        acc = pl.run_scoped(product, plgpu.ACC((ROWS, acc.shape[1]), jnp.float32))
        self.ring.free_value(before)
        return acc

    def _softmax(
        self, s: jax.Array, m: jax.Array, l: jax.Array, j: jax.Array, factor: jax.Array, masked: bool
    ) -> tuple[jax.Array, ...]:
        """(new m, new l, what the old sums shrink by, P in float32)."""
        if masked:
            s = self.visible(s, j)
        m_new = jnp.maximum(m, s.max(axis=1) * factor)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(m_new, s.shape, [0]))
        return m_new, l * alpha + p.sum(axis=1), alpha, p

    def _take_turn(self) -> None:
        if self.turns:
            self.turns.take()

    def _give_turn(self) -> None:
        if self.turns:
            self.turns.give()

    # O += P V on an accumulator.

    def _start(self, o_acc: Any, acc: jax.Array) -> None:
        if not self.interpret:
            o_acc[...] = acc

    def _issue(self, o_acc: Any, p: jax.Array, slot: jax.Array) -> None:
        if not self.interpret:
            plgpu.wgmma(o_acc, p, self.v.at[slot])

    def _collect(self, o_acc: Any, acc: jax.Array, p: jax.Array, slot: jax.Array) -> jax.Array:
        if not self.interpret:
            return o_acc[...]
        return acc + jnp.dot(p, self.v[slot], preferred_element_type=jnp.float32)
