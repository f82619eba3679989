"""The TPU kernel of sparse prefill attention, in Pallas Mosaic TPU: two walks (`tpu_walk`) of every query block.

A query block is several query tiles of one head, whose rows are lanes side by side. The first walk goes over the head's bands.
At one tile distance the query tiles of a block see as many consecutive key tiles, each its own: one copy serves the block,
and scores are products of 128 x 128 along the diagonal, in which nothing is computed that does not count. A step takes several
tile distances; where they are close together their key tiles overlap, and are copied once. The second walk goes over the
head's columns, compacted: all rows see the same keys, but for those that a query tile has in a band already, or that lie
behind it.

Bands need masks in the query tile's own key tile and before the first key; those come last.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.sparse_attention.bands import BAND
from qwen_jax.kernels.sparse_attention.tpu_plan import FIELDS
from qwen_jax.kernels.tpu import LANES, MASKED, SUBLANES_BF16
from qwen_jax.kernels.tpu_walk import KEY_SLOTS, Copy, Scratch, Walk, WalkShape, product

_VMEM_LIMIT = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What can be tuned.

    Attributes:
        tiles: query tiles of BAND rows a block.
        distances: tile distances, and tiles of BAND columns, a step; even.
        wide: whether columns are left out by the matrix unit: free where it is twice as wide as a head.
    """

    tiles: int = 8
    distances: int = 8
    wide: bool = False

    @property
    def columns(self) -> int:
        """Columns a step."""
        return self.distances * BAND

    @property
    def reach(self) -> int:
        """Keys of a copy that serves all distances of a step, if the farthest is at most `distances` from the nearest."""
        return (self.tiles + self.distances) * BAND


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call; versions = rotations of the queries: 3 with dual chunk attention, else 1.

    blocks: query blocks of the piece. capacity: slots of the cache. columns: slots of compacted columns a head.
    """

    versions: int
    batch: int
    heads: int
    kv_heads: int
    blocks: int
    capacity: int
    head_dim: int
    columns: int


@dataclasses.dataclass(frozen=True)
class _Copies:
    """Several copies as one."""

    copies: tuple[Any, ...]

    def start(self) -> None:
        for copy in self.copies:
            copy.start()

    def wait(self) -> None:
        for copy in self.copies:
            copy.wait()


@dataclasses.dataclass(frozen=True)
class _Either:
    """One copy or the other."""

    condition: jax.Array
    yes: Copy
    no: Copy

    def start(self) -> None:
        pl.when(self.condition)(self.yes.start)
        pl.when(~self.condition)(self.no.start)

    def wait(self) -> None:
        pl.when(self.condition)(self.yes.wait)
        pl.when(~self.condition)(self.no.wait)


def sparse_prefill(
    problem: Problem, tiling: Tiling, dtype: Any, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of these shapes: (where, kv_len, counts, near, q, k, v, k_columns, v_columns, left_out) -> (out, lse).

    where: int32[4], (layer, the piece's first query tile, first key tiles of SUCC and of INTRA). kv_len: int32[B]. counts,
    near, left_out: as in `tpu_plan.Plan`, with tiles of `tiling.columns` slots. q: [versions, B, N, R rows, H], versions in
    key order, scaled so that q . k is a base-2 exponent; out: the same without versions. k, v: [L, B, K, S, H]. k_columns,
    v_columns: [X, P, H]. lse: [B, N, 1, R], natural.
    """
    B, N, H, S = problem.batch, problem.heads, problem.head_dim, problem.capacity
    tiles, E = tiling.tiles, tiling.distances
    R, each = tiles * BAND, E // 2  # distances a sub-block
    shape = WalkShape(R, tiling.columns, each * BAND, H, max(E * R, tiling.reach))
    distances = -(-S // BAND)

    def kernel(
        where_ref: Any, kv_len_ref: Any, counts_ref: Any, near_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any,
        k_columns_ref: Any, v_columns_ref: Any, left_out_ref: Any, out_ref: Any, lse_ref: Any, marks: Any, *scratch: Any,
    ) -> None:  # fmt: skip
        b, head, t = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        pair = b * N + head
        at = where_ref[0], b, lax.div(head, N // problem.kv_heads)
        first, succ, intra = where_ref[1] + t * tiles, where_ref[2], where_ref[3]
        kv_len = kv_len_ref[b]
        at_counts = (pair * problem.blocks + t) * FIELDS
        bands, whole, column_tiles, inter_end, succ_end = (counts_ref[at_counts + n] for n in range(FIELDS))

        def version(tile: jax.Array, starts: tuple[jax.Array, jax.Array]) -> jax.Array | int:
            if problem.versions == 1:
                return 0
            return (tile >= starts[0]).astype(jnp.int32) + (tile >= starts[1]).astype(jnp.int32)

        def queries(version: jax.Array | int, a: int) -> jax.Array:
            return q_ref[version, 0, 0, pl.ds(a * BAND, BAND)]

        # --- bands: step n takes distances entry(n E) .. entry(n E + E - 1), ascending but for 0, which comes last

        def entry(m: jax.Array) -> jax.Array:
            return near_ref[0, 0, jnp.where(m < bands - 1, m + 1, 0)]

        def spread(n: jax.Array) -> tuple[list[jax.Array], jax.Array, jax.Array]:
            """The distances of step n, the farthest of them, and whether one copy serves all."""
            apart = [entry(n * E + e) for e in range(E)]
            farthest = functools.reduce(jnp.maximum, apart)
            return apart, farthest, farthest - functools.reduce(jnp.minimum, apart) <= E

        def begin(d: jax.Array, rows: int) -> jax.Array:
            """Where to copy the keys from that the block sees at distance d; they may overhang the cache at either end."""
            return pl.multiple_of(jnp.clip((first - d) * BAND, 0, S - rows), SUBLANES_BF16)

        def copy_bands(n: jax.Array, keys: bool, to: Any, semaphore: Any) -> Copy:
            apart, farthest, together = spread(n)
            source = (k_ref if keys else v_ref).at[at]

            def copy(d: jax.Array, row: int, rows: int) -> Any:
                return pltpu.make_async_copy(
                    source.at[pl.ds(begin(d, rows), rows)], to.at[pl.ds(row, rows)], semaphore
                )

            apiece = _Copies(tuple(copy(d, e * R, R) for e, d in enumerate(apart)))
            return _Either(together, copy(farthest, 0, tiling.reach), apiece)

        def plain_bands(n: jax.Array) -> jax.Array:
            """Every query tile has keys at all distances of step n, all before it, inside the cache and in one stage."""
            nearest, farthest = entry(n * E), entry(n * E + E - 1)
            inside = (n * E + E < whole) & ((first + tiles - nearest) * BAND <= S)
            if problem.versions == 1:
                return inside
            old, new = (
                version(tile, (succ, intra)) for tile in (first - farthest, first + tiles - 1 - nearest)
            )
            return inside & (old == new)

        def key_tiles(n: jax.Array, i: int, ref: Any, masked: bool) -> Callable[[int], list[jax.Array]]:
            """key_tiles(a): of sub-block i of step n, those that query tile a sees at each distance, [BAND, H]."""
            apart, farthest, together = spread(n)
            begins = []  # where a copy lies in the tile, and what lies before the keys of the block's first query tile
            for e, d in list(enumerate(apart))[i * each : (i + 1) * each]:
                copied = jnp.where(together, begin(farthest, tiling.reach), begin(d, R))
                begins.append((jnp.where(together, 0, e * R), (first - d) * BAND - copied))

            def of(a: int) -> list[jax.Array]:
                found = []
                for at_row, before in begins:
                    row = before + a * BAND
                    if masked:  # there may be no such keys
                        row = jnp.clip(row, 0, jnp.where(together, tiling.reach, R) - BAND)
                    found.append(ref[pl.ds(pl.multiple_of(at_row + row, SUBLANES_BF16), BAND)])
                return found

            return of

        def score_bands(n: jax.Array, i: int, keys: Any, masked: bool) -> jax.Array:
            of = key_tiles(n, i, keys, masked)
            if masked:
                return jnp.concatenate([masked_scores(n, i, a, of(a)) for a in range(tiles)], axis=1)
            stage = version(first - entry(n * E), (succ, intra))
            apart = [product(jnp.concatenate(of(a)), queries(stage, a), 1, 1) for a in range(tiles)]
            return jnp.concatenate(apart, axis=1)

        def masked_scores(n: jax.Array, i: int, a: int, k: list[jax.Array]) -> jax.Array:
            found = []
            for e, k_SH in enumerate(k, i * each):
                d = entry(n * E + e)
                tile = first + a - d
                s_SR = product(k_SH, queries(version(tile, (succ, intra)), a), 1, 1)
                key = lax.broadcasted_iota(jnp.int32, (BAND, BAND), 0)
                row = lax.broadcasted_iota(jnp.int32, (BAND, BAND), 1)
                last = jnp.minimum(jnp.where(d == 0, row, BAND - 1), kv_len - 1 - tile * BAND)
                there = (n * E + e < bands) & (tile >= 0)
                found.append(jnp.where(key <= jnp.where(there, last, -1), s_SR, MASKED))
            return jnp.concatenate(found)

        def weigh_bands(n: jax.Array, i: int, values: Any, p_SR: jax.Array, masked: bool) -> jax.Array:
            of = key_tiles(n, i, values, masked)
            apart = [
                product(jnp.concatenate(of(a)), p_SR[:, a * BAND : (a + 1) * BAND], 0, 0)
                for a in range(tiles)
            ]
            return jnp.concatenate(apart, axis=1)

        # --- columns: step n takes columns [n W, n W + W), all of one stage

        W, width = tiling.columns, shape.block_compute
        lane = lax.rem(t * tiles, LANES)  # of the block's first query tile, among those of its group
        group = pl.multiple_of(t * tiles - lane, LANES)

        def copy_columns(n: jax.Array, keys: bool, to: Any, semaphore: Any) -> Copy:
            rows = pl.ds(pl.multiple_of(n * W, W), W)
            source = k_columns_ref if keys else v_columns_ref
            copy = pltpu.make_async_copy(source.at[pair, rows], to.at[pl.ds(0, W)], semaphore)
            if not keys:
                return _Copies((copy,))
            left_out = left_out_ref.at[pair, rows, pl.ds(group, LANES)]
            return _Copies(
                (copy, pltpu.make_async_copy(left_out, marks.at[lax.rem(n, KEY_SLOTS)], semaphore))
            )

        def score_columns(n: jax.Array, i: int, keys: Any, _: bool) -> jax.Array:
            rows = pl.ds(i * width, width)
            k_SH, q_RH = keys[rows], q_ref[version(n, (inter_end, succ_end)), 0, 0]
            left_out = marks[lax.rem(n, KEY_SLOTS), rows].astype(jnp.float32) * MASKED
            if tiling.wide:
                # Query tile a takes lane `lane + a` of what is left out: the product adds it to the scores.
                tile = lax.div(lax.broadcasted_iota(jnp.int32, (R, LANES), 0), BAND) + lane
                own = (tile == lax.broadcasted_iota(jnp.int32, (R, LANES), 1)).astype(q_RH.dtype)
                k_SH = jnp.concatenate([k_SH, left_out.astype(k_SH.dtype)], axis=1)
                return product(k_SH, jnp.concatenate([q_RH, own], axis=1), 1, 1)
            s_SR = product(k_SH, q_RH, 1, 1)
            left_out = pltpu.roll(left_out, LANES - lane, axis=1)
            apart = [s_SR[:, a * BAND : (a + 1) * BAND] + left_out[:, a : a + 1] for a in range(tiles)]
            return jnp.concatenate(apart, axis=1)

        def weigh_columns(_: jax.Array, i: int, values: Any, p_SR: jax.Array, __: bool) -> jax.Array:
            return product(values[pl.ds(i * width, width)], p_SR, 0, 0)

        walk = Walk(shape, Scratch(*scratch), copy_bands, score_bands, weigh_bands)
        walk.reset()
        walk(lax.div(bands + (E - 1), E), plain_bands)
        Walk(shape, Scratch(*scratch), copy_columns, score_columns, weigh_columns)(column_tiles, None)
        out_ref[0, 0] = walk.normalised().astype(dtype)
        lse_ref[0, 0] = walk.natural_lse()

    any_ = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, N, problem.blocks),
            in_specs=[
                pl.BlockSpec(
                    (1, 1, distances), lambda b, n, t, *_: (b * N + n, 0, 0), memory_space=pltpu.SMEM
                ),
                pl.BlockSpec((problem.versions, 1, 1, R, H), lambda b, n, t, *_: (0, b, n, t, 0)),
                *[any_] * 5,
            ],
            out_specs=[
                pl.BlockSpec((1, 1, R, H), lambda b, n, t, *_: (b, n, t, 0)),
                pl.BlockSpec((1, 1, 1, R), lambda b, n, t, *_: (b, n, 0, t)),
            ],
            scratch_shapes=[pltpu.VMEM((KEY_SLOTS, tiling.columns, LANES), jnp.int8), *shape.scratch(dtype)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, N, problem.blocks * R, H), dtype),
            jax.ShapeDtypeStruct((B, N, 1, problem.blocks * R), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        name="sparse_prefill_attention",
        interpret=interpret or False,
    )
