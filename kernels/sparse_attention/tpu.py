"""The TPU kernel of sparse prefill attention, in Pallas Mosaic TPU: two walks (`tpu_walk`) of every query block.

A query block is several query tiles of one head, whose rows are lanes side by side. The first walk goes over the head's bands,
cut into runs of adjacent tile distances (`tpu_plan`). In a run of w, a query tile sees w consecutive key tiles, and the next
query tile the same but for one at either end: one copy serves the block, and most products take several query tiles at once.
Where two query tiles of a product see different keys, these stand side by side, against queries (or weights) that stand
along a diagonal; nothing is computed that does not count. A step takes as many runs of one length as make up its distances. The
second walk goes over the head's columns, compacted: all rows see the same keys, but for those that a query tile has in a
band already, or that lie behind it.

Bands need masks in the query tile's own key tile, before the first key and where stages meet: such steps are taken slot by
slot, whatever their runs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.sparse_attention.bands import BAND
from qwen_jax.kernels.tpu import LANES, MASKED, SUBLANES_INT8, alignment, flat
from qwen_jax.kernels.tpu_walk import KEY_SLOTS, Copy, Scratch, Walk, WalkShape, product

_VMEM_LIMIT = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What can be tuned.

    Attributes:
        tiles: query tiles of BAND rows a block; even.
        distances: tile distances, and tiles of BAND columns, a step; even.
        runs: lengths of runs of adjacent distances, divisors of `distances`, powers of two, longest first, 1 last.
        wide: whether products take two query tiles at once, and the matrix unit leaves out columns (where keys lie along lanes
            it does so anyway): for matrix units twice as wide as a head of 128.
    """

    tiles: int = 8
    distances: int = 8
    runs: tuple[int, ...] = (8, 2, 1)
    wide: bool = False

    @property
    def columns(self) -> int:
        """Columns a step."""
        return self.distances * BAND

    def reach(self, run: int) -> int:
        """Keys that a query block sees in a run of so many distances."""
        return (self.tiles + run - 1) * BAND

    @property
    def fields(self) -> int:
        """int32 a query block, see `tpu_plan.Plan.counts`."""
        return 2 * len(self.runs) + 3


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
    """Copies into consecutive rows, each made where it is used; `whole` has as many bytes, which are waited for at once."""

    parts: Callable[[], list[Copy]]
    whole: Callable[[], Copy]

    def start(self) -> None:
        for copy in self.parts():
            copy.start()

    def wait(self) -> None:
        self.whole().wait()


@dataclasses.dataclass(frozen=True)
class _OneOf:
    """The copy of this number; each is made where it is used."""

    number: jax.Array
    copies: tuple[Callable[[], Copy], ...]

    def start(self) -> None:
        self._each(lambda copy: copy.start())

    def wait(self) -> None:
        self._each(lambda copy: copy.wait())

    def _each(self, do: Callable[[Copy], None]) -> None:
        for number, copy in enumerate(self.copies):

            @pl.when(self.number == number)
            def _(copy: Callable[[], Copy] = copy) -> None:
                do(copy())


@dataclasses.dataclass(frozen=True)
class _Both:
    """Two copies."""

    one: Copy
    other: Copy

    def start(self) -> None:
        self.one.start()
        self.other.start()

    def wait(self) -> None:
        self.one.wait()
        self.other.wait()


def sparse_prefill(
    problem: Problem, tiling: Tiling, dtype: Any, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of these shapes: (where, kv_len, counts, near, q, k, v, k_columns, v_columns, left_out) -> (out, lse).

    where: int32[4], (layer, the piece's first query tile, first key tiles of SUCC and of INTRA). kv_len: int32[B]. counts,
    near, left_out: as in `tpu_plan.Plan`, with tiles of `tiling.columns` slots. q: [versions, B, N, R rows, H], versions in
    key order, scaled so that q . k is a base-2 exponent; out: the same without versions. k, v: [L, B, K, S, H]. k_columns,
    v_columns: [X, P, H]. Where keys lie along lanes (`tpu.flat`): k, v [L, B, K, H, S], columns [X, H, P], left_out
    [X, query tiles, P]. lse: [B, N, 1, R], natural.
    """
    B, N, H, S = problem.batch, problem.heads, problem.head_dim, problem.capacity
    tiles, E = tiling.tiles, tiling.distances
    R, each = tiles * BAND, E // 2  # distances a sub-block
    runs = tiling.runs
    together = 2 if tiling.wide else 1  # query tiles in one product
    across = flat(H)
    keys_axis, head_axis = (1, 0) if across else (0, 1)  # of a tile
    shape = WalkShape(
        R, tiling.columns, each * BAND, H, max(E // run * tiling.reach(run) for run in runs), across
    )
    distances = -(-S // BAND)
    # The matrix unit leaves out columns where it has room beside a head; marks come for so many query tiles at once.
    by_product = tiling.wide or across
    marked = SUBLANES_INT8 if across else LANES

    def part(keys: Any) -> tuple[Any, ...]:
        """These keys of a tile, or of a head in the cache."""
        return (slice(None), keys) if across else (keys, slice(None))

    def values_first(values: jax.Array) -> jax.Array:
        """Values as [H, keys]."""
        return values if across else values.T

    def kernel(
        where_ref: Any, kv_len_ref: Any, counts_ref: Any, near_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any,
        k_columns_ref: Any, v_columns_ref: Any, left_out_ref: Any, out_ref: Any, lse_ref: Any, marks: Any, *scratch: Any,
    ) -> None:  # fmt: skip
        b, head, t = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        pair = b * N + head
        at = where_ref[0], b, lax.div(head, N // problem.kv_heads)
        first, succ, intra = where_ref[1] + t * tiles, where_ref[2], where_ref[3]
        kv_len = kv_len_ref[b]
        at_counts = (pair * problem.blocks + t) * tiling.fields
        fields = [counts_ref[at_counts + n] for n in range(tiling.fields)]
        counts, begins = fields[: len(runs)], fields[len(runs) : 2 * len(runs)]
        column_tiles, inter_end, succ_end = fields[2 * len(runs) :]

        def version(tile: jax.Array, starts: tuple[jax.Array, jax.Array]) -> jax.Array | int:
            if problem.versions == 1:
                return 0
            return (tile >= starts[0]).astype(jnp.int32) + (tile >= starts[1]).astype(jnp.int32)

        def queries(version: jax.Array | int, a: int) -> jax.Array:
            return q_ref[version, 0, 0, pl.ds(a * BAND, BAND)]

        # --- bands: step n takes E // run runs of one length; longest first, and distance 0, a run of 1, last
        #
        # In a run, query tile a sees `run` consecutive key tiles from tile a of a copy on. They stand in `run` slots, tile m in
        # slot m % run: so query tiles of a block share most tiles of a slot.

        first_steps = [jnp.int32(0)]
        for run, count in zip(runs, counts, strict=True):
            first_steps.append(first_steps[-1] + lax.div(count + (E // run - 1), E // run))
        steps = first_steps.pop()

        def length(n: jax.Array) -> jax.Array:
            """Index in `runs` of the length that step n takes."""
            return sum(((n >= step).astype(jnp.int32) for step in first_steps[1:]), start=jnp.int32(0))

        def of_length(values: Sequence[Any], r: jax.Array | int) -> Any:
            if isinstance(r, int):
                return values[r]
            found = values[0]
            for number, value in enumerate(values[1:], 1):
                found = jnp.where(r == number, value, found)
            return found

        def in_list(n: jax.Array, r: jax.Array | int, u: jax.Array | int) -> jax.Array:
            """The place of run u of step n in the list of that length; there may be none there."""
            return (n - of_length(first_steps, r)) * of_length([E // run for run in runs], r) + u

        def nearest(n: jax.Array, r: jax.Array | int, u: jax.Array | int) -> jax.Array:
            """The first tile distance of run u of step n."""
            last = of_length(counts, r) - 1
            place = jnp.minimum(in_list(n, r, u), last)
            # The list of single distances begins with 0.
            place = jnp.where(
                (r == len(runs) - 1) & (place < last), place + 1, jnp.where(r == len(runs) - 1, 0, place)
            )
            return near_ref[0, 0, of_length(begins, r) + place]

        def begin(tile: jax.Array, rows: Any) -> jax.Array:
            """Where to copy so many keys from, that start with this key tile; they may overhang the cache at either end."""
            return pl.multiple_of(jnp.clip(tile * BAND, 0, S - rows), alignment(H))

        def copy_bands(n: jax.Array, keys: bool, to: Any, semaphore: Any, kind: int) -> Copy:
            source = (k_ref if keys else v_ref).at[at]

            def copy(row: jax.Array | int, to_row: int, rows: int) -> Any:
                return pltpu.make_async_copy(
                    source.at[part(pl.ds(row, rows))], to.at[part(pl.ds(to_row, rows))], semaphore
                )

            def copies(r: int) -> Copy:
                run, rows = runs[r], tiling.reach(runs[r])

                def parts() -> list[Copy]:
                    tiles = [first - nearest(n, r, u) - (run - 1) for u in range(E // run)]
                    return [copy(begin(tile, rows), u * rows, rows) for u, tile in enumerate(tiles)]

                whole = to.at[part(pl.ds(0, E // run * rows))]  # a cache may have fewer
                return _Copies(parts, lambda: pltpu.make_async_copy(whole, whole, semaphore))

            if kind:
                return copies(kind - 1)
            return _OneOf(length(n), tuple(functools.partial(copies, r) for r in range(len(runs))))

        def kind_of(n: jax.Array) -> jax.Array:
            """1 + index in `runs`, if every query tile has keys at all distances of step n, all before it, inside the cache
            and in one stage; else 0."""
            r = length(n)
            last_run = of_length([E // run - 1 for run in runs], r)
            near, far = nearest(n, r, 0), nearest(n, r, last_run) + of_length(runs, r) - 1
            listed = of_length(counts, r) - (r == len(runs) - 1).astype(jnp.int32)  # without 0
            plain = (in_list(n, r, last_run) < listed) & (far <= first) & ((first + tiles - near) * BAND <= S)
            if problem.versions > 1:
                old, new = (version(tile, (succ, intra)) for tile in (first - far, first + tiles - 1 - near))
                plain &= old == new
            return jnp.where(plain, r + 1, 0)

        def sub_block(i: int, run: int) -> list[tuple[int, int]]:
            """(run u, place in it) of every slot of sub-block i."""
            return [divmod(e, run) for e in range(i * each, (i + 1) * each)]

        def seen(run: int, place: int, a: int) -> list[int]:
            """The key tiles of a slot that query tiles a .. a + together - 1 see: one, or each its own."""
            return sorted({x + (place - x) % run for x in range(a, a + together)})

        def rows_of(run: int, u: int, m: int) -> Any:
            return part(pl.ds(u * tiling.reach(run) + m * BAND, BAND))

        def diagonal(blocks: list[jax.Array]) -> jax.Array:
            """The matrix with these blocks along its diagonal, else 0."""
            return jnp.concatenate(
                [
                    jnp.concatenate(
                        [jnp.zeros_like(x) if y else x for y in range(-at, len(blocks) - at)], axis=1
                    )
                    for at, x in enumerate(blocks)
                ]
            )

        def score_bands(n: jax.Array, i: int, keys: Any, kind: int) -> jax.Array:
            if not kind:
                return jnp.concatenate([masked_scores(n, i, a, keys) for a in range(tiles)], axis=1)
            run, slots = runs[kind - 1], sub_block(i, runs[kind - 1])
            stage = version(first - nearest(n, kind - 1, 0), (succ, intra))
            found = []
            for a in range(0, tiles, together):
                q = [queries(stage, x) for x in range(a, a + together)]
                scores: dict[tuple[int, int], jax.Array] = {}
                for q_RH, count in ((jnp.concatenate(q), 1), (diagonal(q), together)):
                    alike = [
                        slot for slot in slots if slot not in scores and len(seen(run, slot[1], a)) == count
                    ]
                    if alike:
                        k = [
                            jnp.concatenate(
                                [keys[rows_of(run, u, m)] for m in seen(run, place, a)], axis=head_axis
                            )
                            for u, place in alike
                        ]
                        s_SR = product(jnp.concatenate(k, axis=keys_axis), q_RH, head_axis, 1)
                        scores |= {slot: s_SR[x * BAND : (x + 1) * BAND] for x, slot in enumerate(alike)}
                found.append(jnp.concatenate([scores[slot] for slot in slots]))
            return jnp.concatenate(found, axis=1)

        def weigh_bands(n: jax.Array, i: int, values: Any, p_SR: jax.Array, kind: int) -> jax.Array:
            # The weights are rounded after they are cut: slices of packed numbers would be packed anew.
            def of(a: int, count: int) -> jax.Array:
                return p_SR[:, a * BAND : (a + count) * BAND].astype(dtype)

            if not kind:
                apart = [product(masked_tiles(n, i, a, values), of(a, 1), keys_axis, 0) for a in range(tiles)]
                return jnp.concatenate(apart, axis=1)
            run, slots = runs[kind - 1], sub_block(i, runs[kind - 1])
            # A key tile is transposed, if at all, once for all query tiles that see it.
            v_HS = {
                (u, m): values_first(values[rows_of(run, u, m)])
                for u, place in slots for a in range(0, tiles, together) for m in seen(run, place, a)
            }  # fmt: skip
            found = []
            for a in range(0, tiles, together):
                v = [v_HS[u, m] for u, place in slots for m in seen(run, place, a)]
                p = of(a, together)
                if len(v) > len(slots):
                    p = jnp.concatenate([
                        p_own if len(seen(run, place, a)) == 1 else diagonal(jnp.split(p_own, together, axis=1))
                        for p_own, (_, place) in zip(jnp.split(p, len(slots)), slots, strict=True)
                    ])  # fmt: skip
                found.append(product(jnp.concatenate(v, axis=1), p, 1, 0))
            return jnp.concatenate(found, axis=1)

        def slot_of(n: jax.Array, e: int, a: int) -> tuple[jax.Array, jax.Array, jax.Array]:
            """What query tile a finds in slot e of step n, of runs of any length: (row of its keys in the copies, its key tile,
            whether there is a run); the row is any where there are no keys."""
            r = length(n)
            run, rows = of_length(runs, r), of_length([tiling.reach(run) for run in runs], r)
            u = e >> of_length([run.bit_length() - 1 for run in runs], r)
            first_tile = first - nearest(n, r, u) - (run - 1)
            tile = first_tile + a + ((e - a) & (run - 1))
            row = jnp.clip(tile * BAND - begin(first_tile, rows), 0, rows - BAND)
            there = in_list(n, r, u) < of_length(counts, r)
            return pl.multiple_of(u * rows + row, alignment(H)), tile, there

        def masked_tiles(n: jax.Array, i: int, a: int, ref: Any) -> jax.Array:
            rows = [slot_of(n, e, a)[0] for e in range(i * each, (i + 1) * each)]
            return jnp.concatenate([ref[part(pl.ds(row, BAND))] for row in rows], axis=keys_axis)

        def masked_scores(n: jax.Array, i: int, a: int, keys: Any) -> jax.Array:
            found = []
            key = lax.broadcasted_iota(jnp.int32, (BAND, BAND), 0)
            query = lax.broadcasted_iota(jnp.int32, (BAND, BAND), 1)
            for e in range(i * each, (i + 1) * each):
                row, tile, there = slot_of(n, e, a)
                k, q = keys[part(pl.ds(row, BAND))], queries(version(tile, (succ, intra)), a)
                s_SR = product(k, q, head_axis, 1)
                last = jnp.minimum(jnp.where(tile == first + a, query, BAND - 1), kv_len - 1 - tile * BAND)
                found.append(jnp.where(key <= jnp.where(there & (tile >= 0), last, -1), s_SR, MASKED))
            return jnp.concatenate(found)

        # --- columns: step n takes columns [n W, n W + W), all of one stage

        W, width = tiling.columns, shape.block_compute
        lane = lax.rem(t * tiles, marked)  # of the block's first query tile, among those of its group
        group = pl.multiple_of(t * tiles - lane, marked)

        def copy_columns(n: jax.Array, keys: bool, to: Any, semaphore: Any, _: int) -> Copy:
            columns = pl.ds(pl.multiple_of(n * W, W), W)
            source = (k_columns_ref if keys else v_columns_ref).at[pair]
            copy = pltpu.make_async_copy(source.at[part(columns)], to.at[part(pl.ds(0, W))], semaphore)
            if not keys:
                return copy
            left_out = left_out_ref.at[
                pair, *((pl.ds(group, marked), columns) if across else (columns, pl.ds(group, marked)))
            ]
            return _Both(copy, pltpu.make_async_copy(left_out, marks.at[lax.rem(n, KEY_SLOTS)], semaphore))

        def score_columns(n: jax.Array, i: int, keys: Any, _: int) -> jax.Array:
            columns = part(pl.ds(i * width, width))
            k, q_RH = keys[columns], q_ref[version(n, (inter_end, succ_end)), 0, 0]
            left_out = marks[lax.rem(n, KEY_SLOTS), *columns].astype(jnp.float32) * MASKED
            if by_product:
                # Query tile a has entry `lane + a` of what is left out: the product adds it to the scores.
                tile = lax.div(lax.broadcasted_iota(jnp.int32, (R, marked), 0), BAND) + lane
                own = (tile == lax.broadcasted_iota(jnp.int32, (R, marked), 1)).astype(q_RH.dtype)
                k = jnp.concatenate([k, left_out.astype(k.dtype)], axis=head_axis)
                return product(k, jnp.concatenate([q_RH, own], axis=1), head_axis, 1)
            s_SR = product(k, q_RH, 1, 1)
            # Two columns a word, so that one permutation spreads the marks of both over the lanes.
            left_out = pltpu.roll(left_out, LANES - lane, axis=1).astype(dtype)
            words = pltpu.bitcast(left_out, jnp.int32)
            spread = [jnp.broadcast_to(words[:, a : a + 1], (width // 2, BAND)) for a in range(tiles)]
            return s_SR + pltpu.bitcast(jnp.concatenate(spread, axis=1), dtype).astype(jnp.float32)

        def weigh_columns(_: jax.Array, i: int, values: Any, p_SR: jax.Array, __: int) -> jax.Array:
            return product(values[part(pl.ds(i * width, width))], p_SR.astype(dtype), keys_axis, 0)

        walk = Walk(shape, Scratch(*scratch), copy_bands, score_bands, weigh_bands, kinds=1 + len(runs))
        walk.reset()
        walk(steps, kind_of)
        Walk(shape, Scratch(*scratch), copy_columns, score_columns, weigh_columns)(
            column_tiles, jnp.zeros_like
        )
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
            scratch_shapes=[
                pltpu.VMEM(
                    (KEY_SLOTS, *((marked, tiling.columns) if across else (tiling.columns, marked))), jnp.int8
                ),
                *shape.scratch(dtype),
            ],
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
