"""The Hopper prefill kernel, in Pallas Mosaic GPU: one persistent block a multiprocessor, K and V in a ring of tiles.

A block has two or three consumer warpgroups of 64 query rows each, which walk the key tiles together (`hopper_walk`), and one
producer warpgroup: a warp of it each copies (TMA) tiles of K, tiles of V and queries, so that
none waits for a slot of another's.

Dual chunk attention costs a comparison a step: key tiles come in order, so the stages come INTER, SUCC, INTRA, and at the two
boundaries, which are multiples of the tile, a consumer asks for the same queries in the next rotation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.blocks import Blocks
from qwen_jax.kernels.hopper import Held, Ring, keep_pace, multiprocessors, tiled
from qwen_jax.kernels.hopper_walk import COLUMN, ROW, ROWS, Walk

_PACE_ENDED = 1 << 20  # more than all checks of a round
_L2_BYTES = 32 * 2**20  # K and V of the heads that run side by side should fit in this much of L2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What can be tuned.

    Attributes:
        wgs: consumer warpgroups, 2 or 3; a work item is wgs * 64 query rows of one head.
        block_kv: keys a tile.
        stages: tiles of keys, and of values, that the ring holds.
        cluster: blocks, 1 or 2, that walk the same keys for neighbouring queries and share every copy of K and V.
        pace: key tiles after which a block looks where the others are, and waits if it is two such stretches ahead of their
            average; only where the keys and values of an item do not fit in L2. 0 for never.
        registers: a thread of a consumer and of the producer warpgroup; multiples of 8.
    """

    wgs: int = 2
    block_kv: int = 128
    stages: int = 2
    cluster: int = 1
    registers: tuple[int, int] = (232, 40)
    pace: int = 64

    @property
    def rows(self) -> int:
        """Query rows of one work item."""
        return self.cluster * self.wgs * ROWS


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call; versions = rotations of the queries: 3 with dual chunk attention, else 1.

    blocks: how positions are dealt to several devices, of which this one's are in the cache; None: all are.
    """

    versions: int
    batch: int
    queries: int
    heads: int
    kv_heads: int
    capacity: int
    head_dim: int
    blocks: Blocks | None = None

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads


def heads_together(problem: Problem) -> int:
    """Query heads whose tiles are interleaved in the work order: whole groups whose K and V fit in L2 side by side."""
    kv_bytes = 2 * 2 * problem.capacity * problem.head_dim
    groups = max(1, min(problem.kv_heads, _L2_BYTES // kv_bytes))
    while problem.kv_heads % groups:
        groups -= 1
    return groups * problem.group


def prefill(
    problem: Problem, tiling: Tiling, dtypes: tuple[Any, Any], interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of these shapes: (where, kv_len, q, k, v) -> (out [B, T, N, H], lse [B, N, T rounded up to items]).

    where: int32[5], (layer, q_start, slots of the first SUCC and of the first INTRA key, rank). kv_len: int32[B].
    q: [versions * B, T, N, H], versions in key order, scaled so that q . k is a base-2 exponent. k, v: [L * B * K, S, H].
    T and S are multiples of 8. lse is natural. dtypes: of q and k, and of v and out.
    """
    values_dtype = dtypes[1]
    B, T, N, H = problem.batch, problem.queries, problem.heads, problem.head_dim
    wgs, bkv, stages = tiling.wgs, tiling.block_kv, tiling.stages
    q_tiles = pl.cdiv(T, tiling.rows)
    items = B * N * q_tiles
    blocks = min(multiprocessors() // tiling.cluster, items)
    together = heads_together(problem)
    dca = problem.versions == 3

    def kernel(
        where_ref: Any, kv_len_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, lse_ref: Any,
        q_smem: Any, k_smem: Any, v_smem: Any, o_smem: Any, lse_smem: Any,
        q_full: Any, q_free: Any, k_full: Any, k_free: Any, v_full: Any, v_free: Any,
    ) -> None:  # fmt: skip
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        pace = (
            None
            if interpret or not tiling.pace
            else pl.get_global(plgpu.SemaphoreType.REGULAR((pl.cdiv(items, blocks),)))
        )
        layer, q_start = where_ref[0], where_ref[1]
        # Tiles [0, succ) are INTER, [succ, intra) SUCC, the rest INTRA.
        succ, intra = lax.div(where_ref[2], bkv), lax.div(where_ref[3], bkv)
        held = Held(problem.blocks, where_ref[4], bkv)
        cluster = "cluster" if tiling.cluster > 1 else None
        keys, values = Ring(k_smem, k_full, k_free, cluster), Ring(v_smem, v_full, v_free, cluster)
        in_item = (lax.axis_index("cluster") if cluster else 0) * (
            wgs * ROWS
        )  # this block's first row in an item

        def item(r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            """Round r of this block: (batch row, query head, first query, number of key tiles)."""
            # Longest tiles first within a section of heads, dealt back and forth so that every block's sum is alike.
            n = r * blocks + jnp.where(lax.rem(r, 2) == 0, block, blocks - 1 - block)
            section, n = lax.div(n, together * q_tiles), lax.rem(n, together * q_tiles)
            pair = section * together + lax.rem(n, together)
            b, head = lax.div(pair, N), lax.rem(pair, N)
            t = (q_tiles - 1 - lax.div(n, together)) * tiling.rows
            seen = held.below(jnp.minimum(q_start + t + tiling.rows, kv_len_ref[b]))
            return b, head, t, jnp.maximum(lax.div(seen + (bkv - 1), bkv), 1)

        def each_item(body: Callable[..., jax.Array]) -> jax.Array:
            """The sum that `body` carries over (item, sum so far, round)."""
            whole, rest = divmod(items, blocks)
            place = block if whole % 2 == 0 else blocks - 1 - block
            rounds = whole + (place < rest).astype(jnp.int32)
            return lax.fori_loop(0, rounds, lambda r, done: body(item(r), done, r), jnp.int32(0))

        def consume(work: tuple[jax.Array, ...], first: jax.Array, _: jax.Array) -> jax.Array:
            """One item. `first` counts the key tiles this block has consumed before."""
            b, head, t, tiles = work
            t = t + in_item + wg * ROWS
            o, lse = o_smem.at[wg], lse_smem.at[wg]
            kv_len = kv_len_ref[b]

            def switch_queries(j: jax.Array) -> None:
                if dca:

                    @pl.when((j == succ) | (j == intra))
                    def _() -> None:
                        plgpu.barrier_arrive(q_free.at[wg])
                        plgpu.barrier_wait(q_full.at[wg])

            def visible(s: jax.Array, j: jax.Array) -> jax.Array:
                last = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + (q_start + t)
                last = jnp.minimum(last, kv_len - 1) - held.start(j)
                key = plgpu.broadcasted_iota(jnp.int32, (bkv,), 0, layout=COLUMN)
                seen = lax.broadcast_in_dim(key, s.shape, [1]) <= lax.broadcast_in_dim(last, s.shape, [0])
                return jnp.where(seen, s, -jnp.inf)

            def free_queries() -> None:  # the next item's may come
                plgpu.barrier_arrive(q_free.at[wg])

            walk = Walk(
                q_smem.at[wg], keys, values,
                switch_queries, free_queries, visible, bool(interpret),
            )  # fmt: skip
            plgpu.barrier_wait(q_full.at[wg])
            full = jnp.minimum(lax.div(held.below(jnp.minimum(q_start + t + 1, kv_len)), bkv), tiles)
            softmax = walk(jnp.int32(0), full, tiles, first)
            out, natural = softmax.normalised()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before has left o and lse
            o[...] = out.astype(values_dtype)
            lse[...] = natural
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o, out_ref.at[b, pl.ds(t, ROWS), head])
            plgpu.copy_smem_to_gmem(lse, lse_ref.at[b, head, pl.ds(t, ROWS)])
            return first + tiles

        def load_tiles(
            source: Any, ring: Ring, paced: bool, work: tuple[jax.Array, ...], first: jax.Array, r: jax.Array
        ) -> jax.Array:
            b, head, _, tiles = work
            at = (layer * B + b) * problem.kv_heads + lax.div(head, problem.group)

            # Blocks that walk the same keys far apart read them from memory once each.
            far = tiles * (4 * bkv * H) > _L2_BYTES
            in_round = jnp.where(r < items // blocks, blocks, items % blocks) * tiling.cluster

            def check_pace(j: jax.Array) -> None:
                at_check = far & (lax.rem(j, tiling.pace) == 0) & (j > 0)
                pl.when(at_check)(lambda: keep_pace(pace, r, 1, in_round * (lax.div(j, tiling.pace) - 2)))

            def load(j: jax.Array, _: None) -> None:
                if paced:
                    check_pace(j)
                ring.load(source.at[at, pl.ds(j * bkv, bkv)], first + j)

            lax.fori_loop(0, tiles, load, None)
            if paced:  # nobody waits for a block that has ended its item
                keep_pace(pace, r, _PACE_ENDED, 0)
            return first + tiles

        def load_ring(source: Any, ring: Ring, paced: bool) -> Callable[[], None]:
            def load() -> None:
                ring.drain(each_item(functools.partial(load_tiles, source, ring, paced)))

            return load

        def load_queries(work: tuple[jax.Array, ...], done: jax.Array, _: jax.Array) -> jax.Array:
            """The queries of an item, in the rotation of each stage that it reaches. `done` counts the loads before."""
            b, head, t, tiles = work

            def load(version: jax.Array, n: jax.Array) -> jax.Array:
                for w in range(wgs):
                    pl.when(n > 0)(functools.partial(plgpu.barrier_wait, q_free.at[w]))
                    rows = q_ref.at[version * B + b, pl.ds(t + in_item + w * ROWS, ROWS), head]
                    plgpu.copy_gmem_to_smem(rows, q_smem.at[w], q_full.at[w])
                return n + 1

            if not dca:
                return load(jnp.int32(0), done)
            low = jnp.where(succ > 0, 0, jnp.where(intra > 0, 1, 2))
            high = jnp.where(tiles > intra, 3, jnp.where(tiles > succ, 2, 1))
            return lax.fori_loop(low, high, load, done)

        def load_all_queries() -> None:
            each_item(load_queries)

        @pl.when(wg < wgs)
        def _consume() -> None:
            plgpu.set_max_registers(tiling.registers[0], action="increase")
            each_item(consume)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def _produce() -> None:
            plgpu.set_max_registers(tiling.registers[1], action="decrease")

            @plgpu.warp_map
            def _(warp: jax.Array) -> None:
                for w, load in enumerate(
                    (
                        load_ring(k_ref, keys, pace is not None),
                        load_ring(v_ref, values, False),
                        load_all_queries,
                    )
                ):
                    pl.when(warp == w)(load)

    q_tile, o_tile = (plgpu.SMEM((wgs, ROWS, H), dtype, transforms=tiled(2, H)) for dtype in dtypes)
    k_ring, v_ring = (plgpu.SMEM((stages, bkv, H), dtype, transforms=tiled(2, H)) for dtype in dtypes)
    free: Any = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
    shared: dict[str, Any] = {}
    if tiling.cluster > 1:
        free = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=wgs, num_barriers=stages)
        shared = {"cluster": (tiling.cluster,), "cluster_names": ("cluster",)}
    return plgpu.kernel(
        kernel,
        kernel_name="dense_prefill",
        out_type=[
            jax.ShapeDtypeStruct((B, T, N, H), values_dtype),
            jax.ShapeDtypeStruct((B, N, q_tiles * tiling.rows), jnp.float32),
        ],
        scratch_types=[
            q_tile, k_ring, v_ring, o_tile, plgpu.SMEM((wgs, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=wgs), plgpu.Barrier(num_barriers=wgs),
            *[plgpu.Barrier(num_barriers=stages), free] * 2,
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=wgs + 1,
        thread_name="wg",
        **shared,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )  # fmt: skip
