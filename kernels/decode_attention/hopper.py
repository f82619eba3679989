"""The Hopper decode kernel, in Pallas Mosaic GPU: keys split over blocks, all query heads of a KV head in one tile.

A block has one consumer warpgroup, which walks its share of the key tiles (`hopper_walk`) with the G query heads padded to 64
rows, and one producer warpgroup that keeps the ring of K and V tiles full: decode is bound by memory, so what counts is
bytes in flight. Several blocks may share a multiprocessor. The shares of a row are merged by log-sum-exp afterwards.
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
from qwen_jax.kernels.hopper import Held, Ring, multiprocessors, tiled
from qwen_jax.kernels.hopper_walk import COLUMN, ROWS, Walk

_LN2 = 0.6931471805599453


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What can be tuned.

    Attributes:
        block_kv: keys a tile.
        stages: tiles of keys, and of values, that the ring holds.
        blocks_each: blocks that share a multiprocessor (its shared memory must hold their rings).
        raw_stages: with an 8-bit cache, tiles of keys, and of values, that wait to be converted.
    """

    block_kv: int = 128
    stages: int = 2
    blocks_each: int = 1
    raw_stages: int = 6


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call; versions = rotations of the queries: 3 with dual chunk attention, else 1.

    cache: dtype of keys and values. original: L0 of the length temperature, tokens; 0 for none. blocks: how positions are
    dealt to several devices, of which this one's are in the cache; None: all are.
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
    def quantised(self) -> bool:
        """Whether the cache holds 8-bit numbers with a factor a token and head."""
        return jnp.dtype(self.cache).itemsize == 1

    @property
    def rows(self) -> int:
        """Rows of a partial result: G rounded up to what a copy can move."""
        return -(-self.group // 8) * 8


def shares(problem: Problem, tiling: Tiling) -> int:
    """Into how many shares the keys of a (row, KV head) are split: as few as leave at most 5% of the blocks idle."""
    pairs = problem.batch * problem.kv_heads
    blocks = multiprocessors() * tiling.blocks_each
    most = max(1, min(pl.cdiv(problem.capacity, tiling.block_kv), 2 * blocks // pairs))

    def busy(n: int) -> float:
        return pairs * n / (blocks * pl.cdiv(pairs * n, blocks))

    return next((n for n in range(1, most + 1) if busy(n) >= 0.95), max(range(1, most + 1), key=busy))


def decode(
    problem: Problem, tiling: Tiling, dtype: Any, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of these shapes: (where, rows, cooling, q, k, v[, k_scale, v_scale]) -> (out, lse).

    where: int32[2], (layer, rank). rows: int32[4 * B], for each row its position, prompt length, slots of the first SUCC and of
    the first INTRA key. cooling:
    float32[B], for each row 1 / the temperature of prompt keys. q: [versions * B * K, 64, H], versions in key order, scaled so
    that q . k of a prompt key is a base-2 exponent. k, v: [L * B * K, S, H]; an
    8-bit cache's scales [L * B * K, S] float32. out float32 [B * K * shares, rows, H], lse float32
    [B * K * shares, 64], natural; shares of a (row, KV head) are consecutive.
    """
    B, K, H = problem.batch, problem.kv_heads, problem.head_dim
    bkv, stages = tiling.block_kv, tiling.stages
    n_shares = shares(problem, tiling)
    items = B * K * n_shares
    blocks = min(multiprocessors() * tiling.blocks_each, items)
    dca = problem.versions == 3
    n_sources = 4 if problem.quantised else 2

    def kernel(
        where_ref: Any, rows_ref: Any, cooling_ref: Any, q_ref: Any, *refs: Any
    ) -> None:  # fmt: skip
        sources, (out_ref, lse_ref, q_smem, o_smem, lse_smem, q_full, q_free, *scratch) = (
            refs[:n_sources],
            refs[n_sources:],
        )
        rings = [Ring(*scratch[n : n + 3]) for n in range(0, len(scratch), 3)]
        keys, values = rings[:2]
        loaded = rings[2:] or rings  # the rings that the sources fill
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        held = Held(problem.blocks, where_ref[1], bkv)

        def item(n: jax.Array) -> tuple[jax.Array, ...]:
            """(batch row, its KV head among all rows', first tile, end tile) of share n; the end may not pass the first."""
            pair = lax.div(n, n_shares)
            b = lax.div(pair, K)
            tiles = lax.div(held.below(rows_ref[4 * b] + 1) + (bkv - 1), bkv)
            share = lax.rem(n, n_shares)
            # In this order no product passes int32 for the cache sizes a GPU holds.
            return b, pair, lax.div(tiles * share, n_shares), lax.div(tiles * (share + 1), n_shares)

        def run(body: Callable[..., jax.Array]) -> None:
            """Every share of this block."""
            rounds = lax.div(items - 1 - block, jnp.int32(blocks)) + 1
            lax.fori_loop(0, rounds, lambda r, done: body(r * blocks + block, done), jnp.int32(0))

        def stage_tiles(b: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Tiles [0, succ) are INTER, [succ, intra) SUCC, the rest INTRA."""
            return lax.div(rows_ref[4 * b + 2], bkv), lax.div(rows_ref[4 * b + 3], bkv)

        def consume(n: jax.Array, first: jax.Array) -> jax.Array:
            """One share. `first` counts the key tiles this block has consumed before."""
            b, _, lo, hi = item(n)
            succ, intra = stage_tiles(b)
            position, prompt_len = rows_ref[4 * b], rows_ref[4 * b + 1]
            cooling = cooling_ref[b]
            end = jnp.minimum(
                position + 1, held.start(hi)
            )  # a share without tiles sees nothing of the tile it gets
            hi = jnp.maximum(hi, lo + 1)

            def switch_queries(j: jax.Array) -> None:
                if dca:

                    @pl.when((j == succ) | (j == intra))
                    def _() -> None:
                        plgpu.barrier_arrive(q_free)
                        plgpu.barrier_wait(q_full)

            def visible(s: jax.Array, j: jax.Array) -> jax.Array:
                key = plgpu.broadcasted_iota(jnp.int32, (bkv,), 0, layout=COLUMN) + held.start(j)
                if problem.original:
                    length = jnp.maximum(key + 1, problem.original).astype(jnp.float32) * (
                        1 / problem.original
                    )
                    own = (1 + 0.1 * _LN2 * jnp.log2(length)) * cooling
                    s = s * lax.broadcast_in_dim(jnp.where(key < prompt_len, 1.0, own), s.shape, [1])
                return jnp.where(lax.broadcast_in_dim(key < end, s.shape, [1]), s, -jnp.inf)

            def free_queries() -> None:  # the next share's may come
                plgpu.barrier_arrive(q_free)

            scales = (loaded[2], loaded[3]) if problem.quantised else None
            walk = Walk(q_smem, keys, values, switch_queries, free_queries, visible, bool(interpret), scales)
            plgpu.barrier_wait(q_full)
            plain = jnp.minimum(end, prompt_len) if problem.original else end
            softmax = walk(lo, jnp.minimum(lax.div(held.below(plain), bkv), hi), hi, first)

            out, natural = softmax.normalised()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the share before has left o and lse
            o_smem[...] = out
            lse_smem[...] = natural
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(0, problem.rows)], out_ref.at[n])
            plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[n])
            return first + hi - lo

        def load_tiles(pairs: list[tuple[Any, Ring]], n: jax.Array, first: jax.Array) -> jax.Array:
            _, pair, lo, hi = item(n)
            hi = jnp.maximum(hi, lo + 1)
            at = where_ref[0] * (B * K) + pair

            def load(j: jax.Array, _: None) -> None:
                for source, ring in pairs:
                    ring.load(source.at[at, pl.ds(j * bkv, bkv)], first + j - lo)

            lax.fori_loop(lo, hi, load, None)
            return first + hi - lo

        def convert(n: jax.Array, first: jax.Array) -> jax.Array:
            """A share of an 8-bit cache, tile by tile."""
            _, _, lo, hi = item(n)
            count = jnp.maximum(hi, lo + 1) - lo

            def tile(t: jax.Array, _: None) -> None:
                keys.convert(loaded[0], t)
                values.convert(loaded[1], t)

            lax.fori_loop(first, first + count, tile, None)
            return first + count

        def load_queries(n: jax.Array, done: jax.Array) -> jax.Array:
            """The queries of a share, in the rotation of each stage that it reaches. `done` counts the loads before."""
            b, pair, lo, hi = item(n)
            last = jnp.maximum(hi - 1, lo)

            def load(version: jax.Array, count: jax.Array) -> jax.Array:
                pl.when(count > 0)(lambda: plgpu.barrier_wait(q_free))
                plgpu.copy_gmem_to_smem(q_ref.at[version * (B * K) + pair], q_smem, q_full)
                return count + 1

            if not dca:
                return load(jnp.int32(0), done)
            succ, intra = stage_tiles(b)

            def version(tile: jax.Array) -> jax.Array:
                return (tile >= succ).astype(jnp.int32) + (tile >= intra).astype(jnp.int32)

            return lax.fori_loop(version(lo), version(last) + 1, load, done)

        @pl.when(wg == 0)
        def _consume() -> None:
            plgpu.set_max_registers(208 if tiling.blocks_each > 1 else 240, action="increase")
            run(consume)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def _(warp: jax.Array) -> None:
                by_warp = [
                    functools.partial(load_tiles, list(zip(sources, loaded, strict=True))[w::2])
                    for w in (0, 1)
                ]
                loads: list[Callable[..., jax.Array]] = [*by_warp, load_queries]
                for w, load in enumerate(loads):
                    pl.when(warp == w)(functools.partial(run, load))

        if problem.quantised:

            @pl.when(wg == 2)
            def _convert() -> None:
                run(convert)

    def ring(stages: int, shape: tuple[int, ...], dtype: Any) -> list[Any]:
        """Tiles, full and free of a `Ring`."""
        transforms = tiled(jnp.dtype(dtype).itemsize, H) if len(shape) > 1 else ()
        tiles = plgpu.SMEM((stages, *shape), dtype, transforms=transforms)
        return [tiles, plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_barriers=stages)]

    rings = ring(stages, (bkv, H), dtype) * 2
    if problem.quantised:
        rings += ring(tiling.raw_stages, (bkv, H), problem.cache) * 2
        rings += ring(tiling.raw_stages + stages + 2, (bkv,), jnp.float32) * 2
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((items, problem.rows, H), jnp.float32),
            jax.ShapeDtypeStruct((items, ROWS), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((ROWS, H), dtype, transforms=tiled(2, H)),
            plgpu.SMEM((ROWS, H), jnp.float32, transforms=tiled(4, H)), plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(), plgpu.Barrier(),
            *rings,
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=3 if problem.quantised else 2,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )  # fmt: skip
