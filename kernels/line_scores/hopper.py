"""The Hopper kernels of line scores, in Pallas Mosaic GPU: two walks over the keys, each spread over the whole chip.

A block takes a range of the keys of one KV head and holds the last queries of all its query heads: every key is read from
memory once a walk. The first walk finds each query's log-sum-exp over the range; the ranges' are merged outside. The second
computes the scores again, transposed: keys are rows, so that attention's column sums are sums along rows (`hopper_sums`), and
the keys of a tile stay in registers while the heads take turns. 2^20 keys of 28 heads are 1.9e9 exponentials and 4.8e11 FLOP a
walk, 0.5 ms each at the chip's peak.

Queries are in the rotation of one stage at a time: when a range crosses into the next stage, all warpgroups ask for the queries
again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.blocks import Blocks
from qwen_jax.kernels.hopper import SHARED_BYTES, Held, Ring, multiprocessors, tiled
from qwen_jax.kernels.hopper_rows import COLUMN, LAYOUT, ROW
from qwen_jax.kernels.line_scores import hopper_sums
from qwen_jax.kernels.line_scores.hopper_sums import DIAGONALS, LANE_FLOATS, TILE, WARP_FLOATS
from qwen_jax.kernels.line_scores.last_queries import ROWS

_BARRIER_BYTES = 1024
_NONE = -1e30  # a maximum over nothing: finite, so that differences are


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call; versions = rotations of the queries: 3 with dual chunk attention, else 1.

    blocks: how positions are dealt to several devices, of which this one's are in the cache; None: all are.
    """

    versions: int
    batch: int
    heads: int
    kv_heads: int
    capacity: int
    head_dim: int
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
    def shares(self) -> int:
        """Ranges into which the keys of a pair are split: as few as leave the fewest blocks idle."""
        blocks = multiprocessors()
        most = max(1, min(pl.cdiv(self.capacity, TILE), 2 * blocks // self.pairs))

        def busy(n: int) -> float:
            return self.pairs * n / (blocks * pl.cdiv(self.pairs * n, blocks))

        return max(range(1, most + 1), key=busy)

    @property
    def tiles(self) -> int:
        """Tiles of the second walk that the cache holds."""
        return pl.cdiv(self.capacity, TILE)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What can be tuned: warpgroups that compute, in either walk; keys a tile and most tiles in the ring of the first."""

    first_wgs: int = 3
    first_keys: int = 128
    first_stages: int = 3
    second_wgs: int = 3

    def stages(self, problem: Problem) -> int:
        """Tiles in the ring of the first walk: as many as shared memory holds beside queries and running sums."""
        taken = problem.group * ROWS * (2 * problem.head_dim + 2 * 4 * self.first_wgs) + _BARRIER_BYTES
        return min(self.first_stages, (SHARED_BYTES - taken) // (2 * self.first_keys * problem.head_dim))


class _Work:
    """How the items, (pair, share of its keys), are dealt to blocks, and walked in tiles of one size."""

    def __init__(self, problem: Problem, tile: int, where_ref: Any, rows_ref: Any) -> None:
        self._problem, self._tile = problem, tile
        self.layer = where_ref[0]
        # Tiles [0, succ) are INTER, [succ, intra) SUCC, the rest INTRA.
        self._succ, self._intra = lax.div(where_ref[1], tile), lax.div(where_ref[2], tile)
        self.held = Held(problem.blocks, where_ref[3], tile)
        self._rows_ref = rows_ref
        self._items = problem.pairs * problem.shares
        self.blocks = min(multiprocessors(), self._items)

    def each_item(self, body: Callable[..., Any]) -> None:
        """n = body(item, pair, first query's position, lo, hi, n) for this block's items, n from 0; [lo, hi) are tiles."""
        block, shares = lax.axis_index("block"), self._problem.shares

        def one(r: jax.Array, n: jax.Array) -> jax.Array:
            item = r * self.blocks + block
            pair, share = lax.div(item, shares), lax.rem(item, shares)
            b = lax.div(pair, self._problem.kv_heads)
            tiles = lax.div(self._rows_ref[2 * b + 1] + (self._tile - 1), self._tile)
            # In this order no product passes int32 for the cache sizes a GPU holds.
            lo, hi = lax.div(tiles * share, shares), lax.div(tiles * (share + 1), shares)
            return body(item, pair, self._rows_ref[2 * b], lo, hi, n)

        rounds = lax.div(self._items - 1 - block, jnp.int32(self.blocks)) + 1
        lax.fori_loop(0, rounds, one, jnp.int32(0))

    def each_version(self, lo: jax.Array, hi: jax.Array, body: Callable[..., Any], state: Any) -> Any:
        """body(version, lo, hi, state) -> state for every rotation of the queries that tiles [lo, hi) need, at least one."""
        if self._problem.versions == 1:
            return body(jnp.int32(0), lo, hi, state)

        def version_of(tile: jax.Array) -> jax.Array:
            return (tile >= self._succ).astype(jnp.int32) + (tile >= self._intra).astype(jnp.int32)

        def one(version: jax.Array, state: Any) -> Any:
            begin = jnp.where(version == 2, self._intra, jnp.where(version == 1, self._succ, 0))
            end = jnp.where(version == 2, hi, jnp.where(version == 1, self._intra, self._succ))
            return body(version, jnp.maximum(lo, begin), jnp.minimum(hi, end), state)

        return lax.fori_loop(version_of(lo), version_of(jnp.maximum(hi - 1, lo)) + 1, one, state)

    def load_queries(
        self, q_ref: Any, q_smem: Any, q_full: Any, q_free: Any, also: Callable[[Any], None]
    ) -> None:
        """The producer warp of the queries: all heads of a pair, in the rotation of every stage that a range reaches."""
        pairs = self._problem.pairs

        def load(version: jax.Array, pair: jax.Array) -> jax.Array:
            plgpu.barrier_wait(q_free)
            for head in range(self._problem.group):
                plgpu.copy_gmem_to_smem(q_ref.at[version * pairs + pair, head], q_smem.at[head], q_full)
            also(pair)
            return pair

        def item(_: Any, pair: jax.Array, __: Any, lo: jax.Array, hi: jax.Array, state: Any) -> Any:
            self.each_version(lo, hi, lambda version, *_: load(version, pair), jnp.int32(0))
            return state

        self.each_item(item)


def log_sum_exps(
    problem: Problem, tiling: Tiling, dtype: Any, interpret: Any = None
) -> Callable[..., jax.Array]:
    """The first walk: (where, rows, q, k) -> float32[pairs * shares * wgs, G, ROWS], base 2.

    where: int32[4], (layer, slots of the first SUCC and of the first INTRA key, rank). rows: int32[2 * B], for each row of
    the batch the position of the first query and the number of slots that count. q: [versions * pairs, G, ROWS, H],
    versions in key order, scaled so that q . k is a base-2 exponent. k: [L * pairs, S, H]. The results of a pair are
    consecutive; a query's log-sum-exp is that of all of them, -inf where a range has no key for it.
    """
    G, H, wgs, keys = problem.group, problem.head_dim, tiling.first_wgs, tiling.first_keys
    items = problem.pairs * problem.shares

    def kernel(
        where_ref: Any, rows_ref: Any, q_ref: Any, k_ref: Any, lse_ref: Any,
        q_smem: Any, k_smem: Any, m_smem: Any, l_smem: Any, q_full: Any, q_free: Any, k_full: Any, k_free: Any,
    ) -> None:  # fmt: skip
        wg = lax.axis_index("wg")
        work = _Work(problem, keys, where_ref, rows_ref)
        ring = Ring(k_smem, k_full, k_free)

        def consume(
            item: jax.Array, _: Any, first_query: jax.Array, lo: jax.Array, hi: jax.Array, done: jax.Array
        ) -> Any:
            m_ref, l_ref = m_smem.at[wg], l_smem.at[wg]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the results of the item before have left
            for head in range(G):
                m_ref[head] = plgpu.layout_cast(jnp.full((ROWS,), _NONE, jnp.float32), ROW)
                l_ref[head] = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW)

            def one_head(head: jax.Array, tile: jax.Array, slot: jax.Array, masked: bool) -> None:
                def product(acc: Any) -> jax.Array:
                    plgpu.wgmma(acc, q_smem.at[head], k_smem.at[slot].transpose((1, 0)))
                    return acc[...]

                s = pl.run_scoped(product, plgpu.ACC((ROWS, keys), jnp.float32))
                if masked:
                    last = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + (
                        first_query - work.held.start(tile)
                    )
                    key = plgpu.broadcasted_iota(jnp.int32, (keys,), 0, layout=COLUMN)
                    seen = lax.broadcast_in_dim(key, s.shape, [1]) <= lax.broadcast_in_dim(last, s.shape, [0])
                    s = jnp.where(seen, s, -jnp.inf)
                before = plgpu.load(m_ref.at[head], layout=ROW)
                m = jnp.maximum(before, s.max(axis=1))
                p = jnp.exp2(s - lax.broadcast_in_dim(m, s.shape, [0]))
                l = plgpu.load(l_ref.at[head], layout=ROW) * jnp.exp2(before - m) + p.sum(axis=1)
                m_ref[head] = m
                l_ref[head] = l

            def one_tile(tile: jax.Array, n: jax.Array, masked: bool) -> jax.Array:
                slot = ring.slot(n)
                ring.wait(slot)
                # Heads are dealt in turn over all tiles, so that no warpgroup gets more than its part.
                mine = lax.rem(wg + wgs - lax.rem(tile * G, wgs), wgs)

                def next_head(r: jax.Array, _: None) -> None:
                    one_head(mine + r * wgs, tile, slot, masked)

                lax.fori_loop(0, lax.div(G - 1 - mine + wgs, wgs), next_head, None)
                ring.release(slot)
                return n + 1

            def one_version(_: Any, lo: jax.Array, hi: jax.Array, n: jax.Array) -> jax.Array:
                full = jnp.clip(lax.div(work.held.below(first_query + 1), keys), lo, hi)
                plgpu.barrier_wait(q_full)
                n = lax.fori_loop(lo, full, lambda tile, n: one_tile(tile, n, masked=False), n)
                n = lax.fori_loop(full, hi, lambda tile, n: one_tile(tile, n, masked=True), n)
                plgpu.barrier_arrive(q_free)
                return n

            done = work.each_version(lo, hi, one_version, done)
            for head in range(G):
                m_ref[head] = plgpu.load(m_ref.at[head], layout=ROW) + jnp.log2(
                    plgpu.load(l_ref.at[head], layout=ROW)
                )
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(m_ref, lse_ref.at[item * wgs + wg])
            return done

        def load_keys(
            _: Any, pair: jax.Array, __: Any, lo: jax.Array, hi: jax.Array, done: jax.Array
        ) -> jax.Array:
            def load(tile: jax.Array, n: jax.Array) -> jax.Array:
                ring.load(k_ref.at[work.layer * problem.pairs + pair, pl.ds(tile * keys, keys)], n)
                return n + 1

            return lax.fori_loop(lo, hi, load, done)

        @pl.when(wg < wgs)
        def _consume() -> None:
            plgpu.set_max_registers(_registers(wgs), action="increase")
            plgpu.barrier_arrive(q_free)
            work.each_item(consume)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def _produce() -> None:
            plgpu.set_max_registers(24, action="decrease")

            @plgpu.warp_map
            def _(warp: jax.Array) -> None:
                pl.when(warp == 0)(lambda: work.each_item(load_keys))
                pl.when(warp == 1)(lambda: work.load_queries(q_ref, q_smem, q_full, q_free, lambda _: None))

    stages = tiling.stages(problem)
    return _kernel(
        kernel, problem, wgs, interpret,
        kernel_name="line_scores_norms",
        out_type=jax.ShapeDtypeStruct((items * wgs, G, ROWS), jnp.float32),
        scratch_types=[
            plgpu.SMEM((G, ROWS, H), dtype, transforms=tiled(2, H)),
            plgpu.SMEM((stages, keys, H), dtype, transforms=tiled(2, H)),
            plgpu.SMEM((wgs, G, ROWS), jnp.float32), plgpu.SMEM((wgs, G, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=G), plgpu.Barrier(num_arrivals=wgs),
            plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        ],
    )  # fmt: skip


def line_sums(
    problem: Problem, tiling: Tiling, dtype: Any, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The second walk: (where, rows, q, k, lse) -> (columns, diagonals).

    Arguments as in `log_sum_exps`; lse float32[pairs, G, ROWS], base 2, +inf for a query that does not count. columns
    float32[pairs * G, tiles * TILE]: the sum over queries of every key. diagonals float32[pairs * G, tiles, DIAGONALS]: for the
    keys of one tile, entry x sums over query - key = 63 - x, queries counted from the first and keys from the tile's first.
    Tiles past the keys that count are left as they were.
    """
    G, H, wgs = problem.group, problem.head_dim, tiling.second_wgs

    def kernel(
        where_ref: Any, rows_ref: Any, q_ref: Any, k_ref: Any, lse_ref: Any, columns_ref: Any, diagonals_ref: Any,
        q_smem: Any, k_smem: Any, lse_smem: Any, lanes_smem: Any, warps_smem: Any,
        q_full: Any, q_free: Any, k_full: Any, k_free: Any,
    ) -> None:  # fmt: skip
        wg = lax.axis_index("wg")
        work = _Work(problem, TILE, where_ref, rows_ref)

        def consume(
            _: Any, pair: jax.Array, first_query: jax.Array, lo: jax.Array, hi: jax.Array, done: jax.Array
        ) -> Any:
            def one_head(
                head: jax.Array, n: jax.Array, tile: jax.Array, keys: Any, masked: bool
            ) -> jax.Array:
                def product(acc: Any) -> jax.Array:
                    plgpu.wgmma(acc, keys, q_smem.at[head].transpose((1, 0)))
                    return acc[...]

                s = pl.run_scoped(product, plgpu.ACC((TILE, ROWS), jnp.float32))

                # A load may still be under way when a later arrival is seen; once a product has used what was loaded, none is.
                @pl.when(head == (G - 1 if interpret else 0))
                def _release() -> None:
                    plgpu.barrier_arrive(k_free.at[wg])

                lse = plgpu.load(lse_smem.at[head], layout=COLUMN)
                s = s - lax.broadcast_in_dim(lse, s.shape, [1])
                if masked:
                    key = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ROW) + (
                        work.held.start(tile) - first_query
                    )
                    query = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=COLUMN)
                    seen = lax.broadcast_in_dim(key, s.shape, [0]) <= lax.broadcast_in_dim(
                        query, s.shape, [1]
                    )
                    s = jnp.where(seen, s, -jnp.inf)
                row = pair * G + head
                hopper_sums.add_up(
                    jnp.exp2(s), lanes_smem.at[wg], warps_smem.at[wg, lax.rem(n, 2)],
                    columns_ref.at[row, pl.ds(tile * TILE, TILE)], diagonals_ref.at[row, tile], bool(interpret),
                )  # fmt: skip
                return n + 1

            def one_tile(tile: jax.Array, n: jax.Array, masked: bool) -> jax.Array:
                plgpu.barrier_wait(k_full.at[wg])
                # The interpreter knows no product with registers.
                keys = k_smem.at[wg] if interpret else plgpu.load(k_smem.at[wg], layout=LAYOUT)
                return lax.fori_loop(0, G, lambda head, n: one_head(head, n, tile, keys, masked), n)

            def one_version(_: Any, lo: jax.Array, hi: jax.Array, n: jax.Array) -> jax.Array:
                full = jnp.clip(lax.div(work.held.below(first_query + 1), TILE), lo, hi)

                def tiles(begin: jax.Array, end: jax.Array, n: jax.Array, masked: bool) -> jax.Array:
                    """This warpgroup's of tiles [begin, end): those that are wg mod wgs, counted from lo."""
                    mine = begin + lax.rem(wg + wgs - lax.rem(begin - lo, wgs), wgs)
                    count = lax.div(jnp.maximum(end - mine, 0) + (wgs - 1), wgs)
                    return lax.fori_loop(0, count, lambda r, n: one_tile(mine + r * wgs, n, masked), n)

                plgpu.barrier_wait(q_full)
                n = tiles(full, hi, tiles(lo, full, n, masked=False), masked=True)
                plgpu.barrier_arrive(q_free)
                return n

            return work.each_version(lo, hi, one_version, done)

        def load_keys(_: Any, pair: jax.Array, __: Any, lo: jax.Array, hi: jax.Array, state: Any) -> Any:
            def one_version(_: Any, lo: jax.Array, hi: jax.Array, state: Any) -> Any:
                def load(tile: jax.Array, _: None) -> None:
                    to = lax.rem(tile - lo, wgs)
                    plgpu.barrier_wait(k_free.at[to])
                    source = k_ref.at[work.layer * problem.pairs + pair, pl.ds(tile * TILE, TILE)]
                    plgpu.copy_gmem_to_smem(source, k_smem.at[to], k_full.at[to])

                lax.fori_loop(lo, hi, load, None)
                return state

            return work.each_version(lo, hi, one_version, state)

        def load_queries() -> None:
            def and_lse(pair: jax.Array) -> None:
                plgpu.copy_gmem_to_smem(lse_ref.at[pair], lse_smem, q_full)

            work.load_queries(q_ref, q_smem, q_full, q_free, and_lse)

        @pl.when(wg < wgs)
        def _consume() -> None:
            plgpu.set_max_registers(_registers(wgs), action="increase")
            plgpu.barrier_arrive(q_free)
            plgpu.barrier_arrive(k_free.at[wg])
            if not interpret:
                hopper_sums.clear(lanes_smem.at[wg], warps_smem.at[wg, 0], warps_smem.at[wg, 1])
            work.each_item(consume)

        @pl.when(wg == wgs)
        def _produce() -> None:
            plgpu.set_max_registers(24, action="decrease")

            @plgpu.warp_map
            def _(warp: jax.Array) -> None:
                pl.when(warp == 0)(lambda: work.each_item(load_keys))
                pl.when(warp == 1)(load_queries)

    return _kernel(
        kernel, problem, wgs, interpret,
        kernel_name="line_scores_sums",
        out_type=[
            jax.ShapeDtypeStruct((problem.pairs * G, problem.tiles * TILE), jnp.float32),
            jax.ShapeDtypeStruct((problem.pairs * G, problem.tiles, DIAGONALS), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((G, ROWS, H), dtype, transforms=tiled(2, H)),
            plgpu.SMEM((wgs, TILE, H), dtype, transforms=tiled(2, H)),
            plgpu.SMEM((G, ROWS), jnp.float32),
            plgpu.SMEM((wgs, LANE_FLOATS), jnp.float32), plgpu.SMEM((wgs, 2, WARP_FLOATS), jnp.float32),
            plgpu.Barrier(num_arrivals=G + 1), plgpu.Barrier(num_arrivals=wgs),
            plgpu.Barrier(num_barriers=wgs), plgpu.Barrier(num_barriers=wgs),
        ],
    )  # fmt: skip


def _registers(wgs: int) -> int:
    """Registers of a computing thread: what one producer warpgroup of 24 leaves."""
    return {2: 240, 3: 160, 4: 120}[wgs]


def _kernel(kernel: Any, problem: Problem, wgs: int, interpret: Any, **types: Any) -> Callable[..., Any]:
    return plgpu.kernel(
        kernel,
        grid=(min(multiprocessors(), problem.pairs * problem.shares),),
        grid_names=("block",),
        num_threads=wgs + 1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **types,
    )
