"""The Hopper kernel of sparse prefill attention, in Pallas Mosaic GPU: the dense kernel's walk over a list of tiles.

A work item is one query tile of one head, `BAND` rows in two consumer warpgroups. It walks its own key tile first, the only
one with a causal mask; then the other key tiles in its bands, nearest first, which need no mask at all; then the head's
columns, compacted in tiles of their own, each of one stage. A column that lies in a band of this query tile has counted
already: a warp of the producer warpgroup writes one row of 0 and -inf a column tile, the same for all queries.

What is to be walked is worked out before, by `plan.Plan`: the kernel reads lists.
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
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from qwen_jax.kernels.blocks import Blocks
from qwen_jax.kernels.hopper import Ring, multiprocessors, tiled
from qwen_jax.kernels.hopper_walk import COLUMN, ROW, ROWS, Walk
from qwen_jax.kernels.sparse_attention.bands import BAND
from qwen_jax.kernels.sparse_attention.tiles import entries, residues

WGS = BAND // ROWS
FIELDS, OWN_KEYS = 9, 2  # int32 a work item, see `plan.Plan.items`, and the place of its own keys
_INTER, _SUCC, _INTRA = 0, 1, 2  # rotations of the queries, in key order
_SEGMENTS = (_INTRA, _SUCC, _INTER, _INTER, _SUCC, _INTRA)  # bands, then columns
# What a consumer finds in shared memory of an item, registers being dear: UNTIL is the step that needs other queries, SEEN
# and SEEN_COLUMNS count the key tiles, and of those the column tiles, of the items before.
_HANDED = _PAIR, _TILE, _OWN_KEYS, _BANDS, _STEPS, _SEEN, _SEEN_COLUMNS, _UNTIL = range(8)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What can be tuned.

    Attributes:
        stages: tiles of keys, and of values, that the ring holds.
        rows: rows of column masks that their ring holds.
        registers: a thread of a consumer and of the producer warpgroup; multiples of 8.
    """

    stages: int = 2
    rows: int = 4
    registers: tuple[int, int] = (232, 40)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call; versions = rotations of the queries: 3 with dual chunk attention, else 1."""

    versions: int
    batch: int
    queries: int
    heads: int
    kv_heads: int
    capacity: int
    head_dim: int
    columns: int  # slots of compacted columns a head
    blocks: Blocks | None = (
        None  # how positions are dealt to several devices, of which this one's are in the cache
    )

    @property
    def distances(self) -> int:
        """Tile distances that there are."""
        return pl.cdiv(self.capacity * (self.blocks.count if self.blocks else 1), BAND)

    @property
    def query_tiles(self) -> int:
        """Work items a head."""
        return pl.cdiv(self.queries, BAND)

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads


def sparse_prefill(
    problem: Problem, tiling: Tiling, dtypes: tuple[Any, Any], interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of these shapes, X = batch * heads, M = tile distances, P = column slots:

    (where, factor, items, near, in_band, column_tile, q, k, v, k_columns, v_columns) -> (out [B, T, N, H], lse [B, N, T
    rounded up to tiles]).

    where: int32[2], (layer, q_start), q_start a multiple of BAND. factor: float32[B], positive: factor * q . k is a
    base-2 exponent. items, near, in_band, column_tile: as in `plan.Plan`, flat. q: [versions * B, T, N, H], versions in
    key order. k, v: [L * B * K, S, H]. k_columns, v_columns: [X, P, H]. T and S are multiples of 8. lse is natural.
    dtypes: of q and k, and of v and out.
    """
    values_dtype = dtypes[1]
    B, T, N, H = problem.batch, problem.queries, problem.heads, problem.head_dim
    stages = tiling.stages
    items = B * N * problem.query_tiles
    blocks = min(multiprocessors(), items)
    distances, dealt = problem.distances, problem.blocks
    R, K = residues(dealt), entries(dealt, distances)
    dca = problem.versions == 3

    def kernel(
        where_ref: Any, factor_ref: Any, items_ref: Any, near_ref: Any, in_band_ref: Any, column_tile_ref: Any,
        q_ref: Any, k_ref: Any, v_ref: Any, k_columns_ref: Any, v_columns_ref: Any, out_ref: Any, lse_ref: Any,
        q_smem: Any, k_smem: Any, v_smem: Any, o_smem: Any, lse_smem: Any, rows_smem: Any, hand_smem: Any,
        q_full: Any, q_free: Any, k_full: Any, k_free: Any, v_full: Any, v_free: Any, rows_full: Any, rows_free: Any,
    ) -> None:  # fmt: skip
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        layer, first_tile = where_ref[0], lax.div(where_ref[1], BAND)
        keys, values = Ring(k_smem, k_full, k_free), Ring(v_smem, v_full, v_free)
        rows = Ring(rows_smem, rows_full, rows_free)

        def item(r: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, list[jax.Array]]:
            """Round r of this block: (batch row and head, query tile of the piece, its real keys, ends of the segments)."""
            # Items are sorted by cost: dealt back and forth, every block's sum is alike.
            n = r * blocks + jnp.where(lax.rem(r, 2) == 0, block, blocks - 1 - block)
            pair, tile, own_keys, *ends = (items_ref[n * FIELDS + field] for field in range(FIELDS))
            return pair, tile, own_keys, ends

        def each_item(body: Callable[..., Any], done: Any) -> Any:
            whole, rest = divmod(items, blocks)
            place = block if whole % 2 == 0 else blocks - 1 - block
            rounds = whole + (place < rest).astype(jnp.int32)
            return lax.fori_loop(0, rounds, body, done)

        def consume(r: jax.Array, _: None) -> None:
            plgpu.barrier_wait(q_full.at[wg])
            o, lse = o_smem.at[wg], lse_smem.at[wg]

            def handed(field: int) -> jax.Array:
                return hand_smem[wg, lax.rem(r, 2), field]

            def switch_queries(j: jax.Array) -> None:
                if dca:

                    @pl.when(j == handed(_UNTIL))
                    def _() -> None:
                        plgpu.barrier_arrive(q_free.at[wg])
                        plgpu.barrier_wait(q_full.at[wg])

            def causal(s: jax.Array, _: jax.Array) -> jax.Array:
                last = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + wg * ROWS
                if dealt:  # the first tile may be another, all of which is seen
                    last = last + jnp.maximum(handed(_OWN_KEYS) - BAND, 0)
                last = jnp.minimum(last, handed(_OWN_KEYS) - 1)
                key = plgpu.broadcasted_iota(jnp.int32, (BAND,), 0, layout=COLUMN)
                seen = lax.broadcast_in_dim(key, s.shape, [1]) <= lax.broadcast_in_dim(last, s.shape, [0])
                return jnp.where(seen, s, -jnp.inf)

            def not_in_bands(j: jax.Array) -> jax.Array:
                slot = rows.slot(handed(_SEEN_COLUMNS) + (j - handed(_BANDS)))
                rows.wait(slot)
                row = plgpu.load(rows.tiles.at[slot], layout=COLUMN)
                rows.release(slot)
                return row

            def free_queries() -> None:  # the next item's may come
                plgpu.barrier_arrive(q_free.at[wg])

            walk = Walk(
                q_smem.at[wg], keys, values, switch_queries, free_queries, causal, bool(interpret),
                bias=not_in_bands, factor=factor_ref[lax.div(handed(_PAIR), N)],
            )  # fmt: skip
            softmax = walk(jnp.int32(0), handed(_BANDS), handed(_STEPS), handed(_SEEN))
            out, natural = softmax.normalised()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the item before has left o and lse
            o[...] = out.astype(values_dtype)
            lse[...] = natural
            plgpu.commit_smem()
            pair, t = handed(_PAIR), handed(_TILE) * BAND + wg * ROWS
            b, head = lax.div(pair, N), lax.rem(pair, N)
            plgpu.copy_smem_to_gmem(o, out_ref.at[b, pl.ds(t, ROWS), head])
            plgpu.copy_smem_to_gmem(lse, lse_ref.at[b, head, pl.ds(t, ROWS)])

        def load_tiles(source: Any, columns: Any, ring: Ring, r: jax.Array, first: jax.Array) -> jax.Array:
            pair, tile, own_keys, ends = item(r)
            b, head = lax.div(pair, N), lax.rem(pair, N)
            at = (layer * B + b) * problem.kv_heads + lax.div(head, problem.group)
            bands, steps = ends[2], ends[5]

            query_tile = first_tile + tile
            listed = (pair if R == 1 else pair * R + lax.rem(query_tile, R)) * K
            if dealt:
                listed = listed + (own_keys > BAND).astype(jnp.int32)

            def load_band(j: jax.Array, _: None) -> None:
                key_tile = query_tile - near_ref[listed + j]
                if dealt:  # from positions to slots
                    each = dealt.size // BAND
                    key_tile = lax.div(key_tile, R) * each + lax.rem(key_tile, each)
                # Where no key of the own tile is real and here, nothing there need be a number: the first is read, and masked.
                key_tile = jnp.where((j > 0) | (own_keys > 0), key_tile, 0)
                ring.load(source.at[at, pl.ds(key_tile * BAND, BAND)], first + j)

            def load_columns(j: jax.Array, _: None) -> None:
                ring.load(columns.at[pair, pl.ds((j - bands) * BAND, BAND)], first + j)

            lax.fori_loop(0, bands, load_band, None)
            lax.fori_loop(bands, steps, load_columns, None)
            return first + steps

        def write_rows(r: jax.Array, first: jax.Array) -> jax.Array:
            pair, tile, _, ends = item(r)
            bands, steps = ends[2], ends[5]

            def write(j: jax.Array, _: None) -> None:
                n = first + (j - bands)
                rows.claim(n)
                slot = rows.slot(n)
                write_row(
                    rows.tiles.at[slot],
                    column_tile_ref.at[pl.ds(pair * problem.columns + (j - bands) * BAND, BAND)],
                    in_band_ref.at[pl.ds(pair * distances, distances)],
                    first_tile + tile,
                    bool(interpret),
                )
                plgpu.barrier_arrive(rows.full.at[slot])

            lax.fori_loop(bands, steps, write, None)
            return first + (steps - bands)

        def load_queries(r: jax.Array, counts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            """The queries of an item, in the rotation of each segment that has a tile, and what is handed over.

            `counts` holds the loads, key tiles and column tiles before.
            """
            pair, tile, own_keys, ends = item(r)
            done, seen, seen_columns = counts
            after = seen + ends[5], seen_columns + (ends[5] - ends[2])
            b, head = lax.div(pair, N), lax.rem(pair, N)

            def load(which: Any, n: jax.Array, until: jax.Array, first: bool) -> None:
                for w in range(WGS):
                    pl.when(n > 0)(functools.partial(plgpu.barrier_wait, q_free.at[w]))
                    fields = {_UNTIL: until}
                    if first:
                        fields |= {
                            _PAIR: pair,
                            _TILE: tile,
                            _OWN_KEYS: own_keys,
                            _BANDS: ends[2],
                            _STEPS: ends[5],
                        }
                        fields |= {_SEEN: seen, _SEEN_COLUMNS: seen_columns}
                    # The item before the last has been left: its successor's queries are back, or are being read.
                    for field, value in fields.items():
                        hand_smem[w, lax.rem(r, 2), field] = value
                    rows = q_ref.at[which * B + b, pl.ds(tile * BAND + w * ROWS, ROWS), head]
                    plgpu.copy_gmem_to_smem(rows, q_smem.at[w], q_full.at[w])

            if not dca:
                load(0, done, ends[5], first=True)
                return done + 1, *after
            # A segment that has tiles asks for its rotation, unless that is the one at hand.
            foremost = jnp.int32(_INTRA)  # that of the own tile, or of what the walk begins with instead
            if dealt:
                foremost = jnp.where(ends[0] > 0, _INTRA, jnp.where(ends[1] > 0, _SUCC, _INTER))
            now, switches = foremost, []
            for which, start, end in zip(_SEGMENTS[1:], ends, ends[1:], strict=False):
                switches.append((which, start, (end > start) & (now != which)))
                now = jnp.where(end > start, which, now)
            until, loads = ends[5], []
            for which, start, needed in reversed(switches):
                loads.append((which, until, needed))
                until = jnp.where(needed, start, until)
            load(foremost if dealt else _INTRA, done, until, first=True)
            done = done + 1
            for which, until, needed in reversed(loads):
                pl.when(needed)(functools.partial(load, which, done, until, first=False))
                done = done + needed.astype(jnp.int32)
            return done, *after

        @pl.when(wg < WGS)
        def _consume() -> None:
            plgpu.set_max_registers(tiling.registers[0], action="increase")
            each_item(consume, None)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WGS)
        def _produce() -> None:
            plgpu.set_max_registers(tiling.registers[1], action="decrease")

            @plgpu.warp_map
            def _(warp: jax.Array) -> None:
                zero = jnp.int32(0)
                loads: list[tuple[Callable[..., Any], Any]] = [
                    (functools.partial(load_tiles, k_ref, k_columns_ref, keys), zero),
                    (functools.partial(load_tiles, v_ref, v_columns_ref, values), zero),
                    (load_queries, (zero, zero, zero)),
                    (write_rows, zero),
                ]

                def run(load: Callable[..., Any], done: Any) -> None:
                    each_item(load, done)

                for w, (load, done) in enumerate(loads):
                    pl.when(warp == w)(functools.partial(run, load, done))

    q_tile, o_tile = (plgpu.SMEM((WGS, ROWS, H), dtype, transforms=tiled(2, H)) for dtype in dtypes)
    k_ring, v_ring = (plgpu.SMEM((stages, BAND, H), dtype, transforms=tiled(2, H)) for dtype in dtypes)
    full = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=WGS, num_barriers=stages)
    return plgpu.kernel(
        kernel,
        kernel_name="sparse_prefill",
        out_type=[
            jax.ShapeDtypeStruct((B, T, N, H), values_dtype),
            jax.ShapeDtypeStruct((B, N, problem.query_tiles * BAND), jnp.float32),
        ],
        scratch_types=[
            q_tile, k_ring, v_ring, o_tile, plgpu.SMEM((WGS, ROWS), jnp.float32),
            plgpu.SMEM((tiling.rows, BAND), jnp.float32), plgpu.SMEM((WGS, 2, len(_HANDED)), jnp.int32),
            plgpu.Barrier(num_barriers=WGS), plgpu.Barrier(num_barriers=WGS), full, free, full, free,
            plgpu.Barrier(num_barriers=tiling.rows), plgpu.Barrier(num_arrivals=WGS, num_barriers=tiling.rows),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WGS + 1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )  # fmt: skip


def write_row(row: Any, column_tiles: Any, in_band: Any, query_tile: jax.Array, interpret: bool) -> None:
    """One warp writes what is added to the scores of a tile of columns: 0 where a column counts, else -inf.

    A column counts iff its key tile lies before the query tile and in none of its bands.

    Args:
        row: float32[BAND] in shared memory.
        column_tiles: int32[BAND] in global memory, the key tile of every column.
        in_band: int8[M] in global memory, by tile distance.
        query_tile: int32.
        interpret: take plain jax operations, for the interpreter.
    """
    if interpret:
        apart = query_tile - column_tiles[...]
        outside = in_band[...][jnp.clip(apart, 0, in_band.shape[0] - 1)] == 0
        row[...] = jnp.where((apart > 0) & outside, 0.0, -jnp.inf)
        return

    # Warp-level code of Pallas has no vectors: the 32 lanes are written out in MLIR.
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def write(_: Any, row: Any, column_tiles: Any, in_band: Any, query_tile: Any) -> None:
        i8, i32, f32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.F32Type.get()
        to, tiles, bands = (mgpu.utils.memref_ptr(x) for x in (row, column_tiles, in_band))
        (c,) = query_tile.registers.flat
        each = BAND // 32
        start = arith.muli(
            arith.remui(mgpu.utils.thread_idx(), mgpu.utils.c(32, i32)), mgpu.utils.c(each, i32)
        )
        zero = mgpu.utils.c(0, i32)
        lane_tiles = llvm.load(ir.VectorType.get((each,), i32), mgpu.utils.getelementptr(tiles, [start], i32))
        values = []
        for n in range(each):
            apart = arith.subi(c, llvm.extractelement(lane_tiles, mgpu.utils.c(n, i32)))
            before = arith.cmpi(arith.CmpIPredicate.sgt, apart, zero)
            band = llvm.load(i8, mgpu.utils.getelementptr(bands, [arith.maxsi(apart, zero)], i8))
            outside = arith.cmpi(arith.CmpIPredicate.eq, band, mgpu.utils.c(0, i8))
            counts = arith.andi(before, outside)
            values.append(arith.select(counts, mgpu.utils.c(0.0, f32), mgpu.utils.c(float("-inf"), f32)))
        for n, value in enumerate(values):
            at = mgpu.utils.getelementptr(to, [arith.addi(start, mgpu.utils.c(n, i32))], f32)
            llvm.store(value, at)

    write(row, column_tiles, in_band, query_tile)
