"""The TPU prefill kernel, in Pallas Mosaic TPU: a grid of query tiles, each of which walks its key tiles (`tpu_walk`).

Dual chunk attention costs a comparison a tile: the three rotations of a query tile lie in VMEM together, and every key tile
picks one by its place. Tiles above the diagonal are not visited; K and V are copied from the cache where they lie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.blocks import Blocks
from qwen_jax.kernels.tpu import MASKED, alignment, flat, positions
from qwen_jax.kernels.tpu_walk import Scratch, Walk, WalkShape, product

_VMEM_LIMIT = 48 * 2**20


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What can be tuned.

    Attributes:
        block_q: most rows of a query tile: tokens times the query heads of one KV head that are taken together.
        block_kv: keys a tile.
        block_compute: keys of which scores are held at once; block_kv is an even multiple of it.
    """

    block_q: int = 1024
    block_kv: int = 1024
    block_compute: int = 512


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call, with queries laid out in bundles: `bundles` of `together` query heads of one KV head each.

    A bundle's rows come tile by tile; a tile is `tokens` positions of one head after another. capacity: slots of the cache.
    blocks: which positions the slots hold; None: all, in order.
    """

    versions: int
    batch: int
    bundles: int
    together: int
    tiles: int
    tokens: int
    kv_heads: int
    capacity: int
    head_dim: int
    blocks: Blocks | None = None

    @property
    def rows(self) -> int:
        """Rows of a query tile."""
        return self.together * self.tokens


def prefill(
    problem: Problem, tiling: Tiling, dtype: Any, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of these shapes: (where, kv_len, walks, q, k, v) -> (out, lse [B, X, 1, R]).

    where: int32[5], (layer, q_start, first tile of SUCC keys, of INTRA keys, rank among the blocks). kv_len: int32[B].
    walks: int32[B * tiles * 2], (key tiles, those that all rows see whole) of every query tile. q: [versions, B, X bundles,
    R rows, H], versions in key order, scaled so that q . k is a base-2 exponent; out: the same without versions.
    k, v: [L, B, K, S, H], or [L, B, K, H, S] where they lie so (`tpu.flat`). lse is natural.
    """
    B, X, H, S = problem.batch, problem.bundles, problem.head_dim, problem.capacity
    R, R_all, block_kv = problem.rows, problem.tiles * problem.rows, tiling.block_kv
    width = tiling.block_compute
    across = flat(H)
    keys_axis, head_axis = (1, 0) if across else (0, 1)  # of a tile
    shape = WalkShape(R, block_kv, width, H, block_kv, across)
    whole_kind = 1  # of key tiles that all rows see whole; those of kind 0 are masked

    def part(keys: Any) -> tuple[Any, ...]:
        """These keys of a tile, or of a head in the cache."""
        return (slice(None), keys) if across else (keys, slice(None))

    def kernel(
        where_ref: Any, kv_len_ref: Any, walks_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any,
        lse_ref: Any, *scratch: Any,
    ) -> None:  # fmt: skip
        b, x, t = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        first = where_ref[1] + t * problem.tokens
        succ, intra, rank = where_ref[2], where_ref[3], where_ref[4]
        row = lax.broadcasted_iota(jnp.int32, (1, R), 1)
        last_seen = jnp.minimum(first + lax.rem(row, problem.tokens), kv_len_ref[b] - 1)
        at = where_ref[0], b, lax.div(x, problem.bundles // problem.kv_heads)

        def start(n: jax.Array) -> jax.Array:
            # The last tile may overhang the cache: it is copied from further left.
            return pl.multiple_of(jnp.minimum(n * block_kv, S - block_kv), alignment(H))

        def copy(n: jax.Array, keys: bool, destination: Any, semaphore: Any, _: int) -> Any:
            source = (k_ref if keys else v_ref).at[(*at, *part(pl.ds(start(n), block_kv)))]
            return pltpu.make_async_copy(source, destination, semaphore)

        def queries(n: jax.Array) -> jax.Array:
            if problem.versions == 1:
                return q_ref[0, 0, 0]
            return q_ref[jnp.where(n < succ, 0, jnp.where(n < intra, 1, 2)), 0, 0]

        def score(n: jax.Array, i: int, keys: Any, kind: int) -> jax.Array:
            s_SR = product(keys[part(pl.ds(i * width, width))], queries(n), head_axis, 1)
            if kind == whole_kind:
                return s_SR
            slot = lax.broadcasted_iota(jnp.int32, (width, R), 0) + (start(n) + i * width)
            seen = positions(slot, problem.blocks, rank) <= last_seen
            if S % block_kv:
                seen &= slot >= n * block_kv
            return jnp.where(seen, s_SR, MASKED)

        def weigh(_: jax.Array, i: int, values: Any, p_SR: jax.Array, __: int) -> jax.Array:
            return product(values[part(pl.ds(i * width, width))], p_SR.astype(dtype), keys_axis, 0)

        walk = Walk(shape, Scratch(*scratch), copy, score, weigh, kinds=1 + whole_kind)
        walk.reset()
        at_walk = 2 * (b * problem.tiles + t)
        whole = walks_ref[at_walk + 1]
        walk(walks_ref[at_walk], lambda n: (n < whole).astype(jnp.int32))
        out_ref[0, 0] = walk.normalised().astype(dtype)
        lse_ref[0, 0] = walk.natural_lse()

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, X, problem.tiles),
            in_specs=[
                pl.BlockSpec((problem.versions, 1, 1, R, H), lambda b, x, t, *_: (0, b, x, t, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, R, H), lambda b, x, t, *_: (b, x, t, 0)),
                pl.BlockSpec((1, 1, 1, R), lambda b, x, t, *_: (b, x, 0, t)),
            ],
            scratch_shapes=shape.scratch(dtype),
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, X, R_all, H), dtype),
            jax.ShapeDtypeStruct((B, X, 1, R_all), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        name="prefill_attention",
        interpret=interpret or False,
    )
