"""The Hopper decode kernel for 16-bit caches: keys split over blocks, all query heads of a KV head in one tile.

A block has one consumer warpgroup, which walks its share of the key tiles (`hopper_walk`) with the G query heads padded to 64
rows, and one producer warpgroup that keeps the ring of K and V tiles full: decode is bound by memory, so what counts is
bytes in flight. Several blocks may share a multiprocessor. The shares of a row are merged by log-sum-exp afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.decode_attention.split import Problem, Split, Tiling
from qwen_jax.kernels.hopper import Held, Ring, multiprocessors, tiled
from qwen_jax.kernels.hopper_walk import COLUMN, ROWS, Walk

_LN2 = 0.6931471805599453


def decode(
    problem: Problem, tiling: Tiling, dtypes: tuple[Any, Any], interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of these shapes: (where, rows, cooling, q, k, v) -> (out, lse).

    where: int32[2], (layer, rank). rows: int32[4 * B], as `Split` wants it. cooling: float32[B], for each row 1 / the
    temperature of prompt keys. q: [versions * B * K, 64, H], versions in key order, scaled so that q . k of a prompt key is a
    base-2 exponent. k, v: [L * B * K, S, H]. out float32 [B * K * shares, G rounded up to 8, H], lse float32
    [B * K * shares, 64], natural; shares of a (row, KV head) are consecutive. dtypes: of q and k, and of v.
    """
    H, bkv = problem.head_dim, tiling.block_kv
    split = functools.partial(Split, problem, tiling)
    items = split(None, None, 1).items
    blocks = min(multiprocessors() * tiling.walks, items)
    dca = problem.versions == 3
    rows = pl.cdiv(problem.group, 8) * 8  # that a copy can move

    def kernel(
        where_ref: Any, rows_ref: Any, cooling_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, lse_ref: Any,
        q_smem: Any, o_smem: Any, lse_smem: Any, q_full: Any, q_free: Any, *rings: Any,
    ) -> None:  # fmt: skip
        keys, values = Ring(*rings[:3]), Ring(*rings[3:])
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        held = Held(problem.blocks, where_ref[1], bkv)
        shares = split(held, rows_ref, blocks)

        def consume(n: jax.Array, first: jax.Array) -> jax.Array:
            """One share. `first` counts the key tiles this block has consumed before."""
            b, _, lo, hi = shares.item(n)
            succ, intra = shares.stage_tiles(b)
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

            walk = Walk(q_smem, keys, values, switch_queries, free_queries, visible, bool(interpret))
            plgpu.barrier_wait(q_full)
            plain = jnp.minimum(end, prompt_len) if problem.original else end
            softmax = walk(lo, jnp.minimum(lax.div(held.below(plain), bkv), hi), hi, first)

            out, natural = softmax.normalised()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the share before has left o and lse
            o_smem[...] = out
            lse_smem[...] = natural
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem.at[pl.ds(0, rows)], out_ref.at[n])
            plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[n])
            return first + hi - lo

        def load_tiles(source: Any, ring: Ring, n: jax.Array, first: jax.Array) -> jax.Array:
            _, pair, lo, hi = shares.item(n)
            hi = jnp.maximum(hi, lo + 1)
            at = where_ref[0] * problem.pairs + pair

            def load(j: jax.Array, _: None) -> None:
                ring.load(source.at[at, pl.ds(j * bkv, bkv)], first + j - lo)

            lax.fori_loop(lo, hi, load, None)
            return first + hi - lo

        def load_queries(n: jax.Array, done: jax.Array) -> jax.Array:
            """The queries of a share, in the rotation of each stage that it reaches. `done` counts the loads before."""
            b, pair, lo, hi = shares.item(n)
            last = jnp.maximum(hi - 1, lo)

            def load(version: jax.Array, count: jax.Array) -> jax.Array:
                pl.when(count > 0)(lambda: plgpu.barrier_wait(q_free))
                plgpu.copy_gmem_to_smem(q_ref.at[version * problem.pairs + pair], q_smem, q_full)
                return count + 1

            if not dca:
                return load(jnp.int32(0), done)
            succ, intra = shares.stage_tiles(b)

            def version(tile: jax.Array) -> jax.Array:
                return (tile >= succ).astype(jnp.int32) + (tile >= intra).astype(jnp.int32)

            return lax.fori_loop(version(lo), version(last) + 1, load, done)

        @pl.when(wg == 0)
        def _consume() -> None:
            plgpu.set_max_registers(208 if tiling.walks > 1 else 240, action="increase")
            shares.run(block, consume)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 1)
        def _produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @plgpu.warp_map
            def _(warp: jax.Array) -> None:
                loads: list[Callable[..., jax.Array]] = [
                    functools.partial(load_tiles, k_ref, keys),
                    functools.partial(load_tiles, v_ref, values),
                    load_queries,
                ]
                for w, load in enumerate(loads):
                    pl.when(warp == w)(functools.partial(shares.run, block, load))

    rings: list[Any] = []
    for dtype in dtypes:
        rings += [
            plgpu.SMEM((tiling.stages, bkv, H), dtype, transforms=tiled(2, H)),
            plgpu.Barrier(num_barriers=tiling.stages), plgpu.Barrier(num_barriers=tiling.stages),
        ]  # fmt: skip
    return plgpu.kernel(
        kernel,
        kernel_name="decode_attention",
        out_type=[
            jax.ShapeDtypeStruct((items, rows, H), jnp.float32),
            jax.ShapeDtypeStruct((items, ROWS), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((ROWS, H), dtypes[0], transforms=tiled(2, H)),
            plgpu.SMEM((ROWS, H), jnp.float32, transforms=tiled(4, H)), plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(), plgpu.Barrier(),
            *rings,
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=2,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )  # fmt: skip
