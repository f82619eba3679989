"""The TPU kernels of line scores, in Pallas Mosaic TPU: two walks over the keys, a tile at a time for all heads of a KV head.

In the first, scores stand keys x rows, so that the running maximum of a row is a lane. In the second they stand rows x keys: a
column's sum runs over sublanes, and so does a diagonal's once every row has been moved along the lanes by its number.
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

from qwen_jax.kernels.line_scores.last_queries import ROWS
from qwen_jax.kernels.tpu import LANES, MASKED, NOTHING_YET, flat
from qwen_jax.kernels.tpu_walk import product

_VMEM_LIMIT = 48 * 2**20


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call; versions = rotations of the queries: 3 with dual chunk attention, else 1.

    capacity: slots of the cache, in tiles of `block_kv`.
    """

    versions: int
    batch: int
    heads: int
    kv_heads: int
    capacity: int
    head_dim: int
    block_kv: int

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Queries of one KV head, in whole lanes."""
        return -(-self.group * ROWS // LANES) * LANES

    @property
    def tiles(self) -> int:
        """Tiles of keys that the cache holds."""
        return -(-self.capacity // self.block_kv)

    @property
    def diagonals(self) -> int:
        """Entries for the diagonals of a tile: key - query from -(ROWS - 1) on, in whole lanes."""
        return self.block_kv + LANES


def log_sum_exps(problem: Problem, interpret: Any = None) -> Callable[..., jax.Array]:
    """The first walk: (where, rows, q, k) -> float32[B, K, 1, rows], base 2; below -1e29 for a query that sees no key.

    where: int32[3], (layer, first tiles of SUCC and of INTRA keys). rows: int32[2 * B], for each row of the batch the position
    of its first query and the number of keys that count. q: [versions, B, K, rows, H], versions in key order, scaled so that
    q . k is a base-2 exponent; a head's ROWS queries from the last to the first. k: [L, B, K, S, H], or [L, B, K, H, S] where
    it lies so (`tpu.flat`).
    """
    R, W, head_axis = problem.rows, problem.block_kv, 0 if flat(problem.head_dim) else 1

    def kernel(
        where_ref: Any, rows_ref: Any, q_ref: Any, k_ref: Any, lse_ref: Any, peak: Any, total: Any
    ) -> None:
        b, n = pl.program_id(0), pl.program_id(2)
        first, end = rows_ref[2 * b], rows_ref[2 * b + 1]

        @pl.when(n == 0)
        def _() -> None:
            peak[...] = jnp.full_like(peak, NOTHING_YET)
            total[...] = jnp.zeros_like(total)

        @pl.when(n * W < end)
        def _() -> None:
            s_SR = product(k_ref[0, 0, 0], q_ref[_version(problem, where_ref, n), 0, 0], head_axis, 1)
            key = lax.broadcasted_iota(jnp.int32, (W, R), 0) + n * W
            row = lax.broadcasted_iota(jnp.int32, (W, R), 1)
            s_SR = jnp.where(key <= first + (ROWS - 1) - (row & (ROWS - 1)), s_SR, MASKED)
            old = peak[...]
            new = jnp.maximum(old, s_SR.max(axis=0, keepdims=True))
            peak[...] = new
            total[...] = total[...] * jnp.exp2(old - new) + jnp.exp2(s_SR - new).sum(axis=0, keepdims=True)

        @pl.when(n == problem.tiles - 1)
        def _() -> None:
            lse_ref[0, 0] = peak[...] + jnp.log2(total[...])

    return _walk(
        kernel, problem, interpret, "line_scores_lse",
        inputs=[],
        out_specs=pl.BlockSpec((1, 1, 1, R), lambda b, h, n, *_: (b, h, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((problem.batch, problem.kv_heads, 1, R), jnp.float32),
        scratch_shapes=[pltpu.VMEM((1, R), jnp.float32), pltpu.VMEM((1, R), jnp.float32)],
    )  # fmt: skip


def line_sums(problem: Problem, interpret: Any = None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The second walk: (where, rows, q, k, lse) -> (columns, diagonals).

    Arguments as in `log_sum_exps`; lse float32[B, K, rows, 1], base 2, +inf for a query that does not count. columns float32
    [B, K, G, tiles * block_kv]: the sum over queries of every key. diagonals float32[B, K, tiles, G, block_kv + LANES]: for the
    keys of one tile, entry x sums over key - query = x - (ROWS - 1), counted from the first of each. Tiles past the keys that
    count hold zeros.
    """
    B, K, W, G = problem.batch, problem.kv_heads, problem.block_kv, problem.group
    head_axis = 0 if flat(problem.head_dim) else 1

    def kernel(
        where_ref: Any, rows_ref: Any, q_ref: Any, k_ref: Any, lse_ref: Any, columns_ref: Any, diagonals_ref: Any
    ) -> None:  # fmt: skip
        b, n = pl.program_id(0), pl.program_id(2)
        first, end = rows_ref[2 * b], rows_ref[2 * b + 1]

        @pl.when(n * W >= end)
        def _() -> None:
            columns_ref[...] = jnp.zeros_like(columns_ref)
            diagonals_ref[...] = jnp.zeros_like(diagonals_ref)

        @pl.when(n * W < end)
        def _() -> None:
            version = _version(problem, where_ref, n)
            back = lax.broadcasted_iota(jnp.int32, (ROWS, W), 0)
            key = lax.broadcasted_iota(jnp.int32, (ROWS, W), 1) + n * W
            seen = key <= first + (ROWS - 1) - back
            for g in range(G):
                rows = pl.ds(g * ROWS, ROWS)
                s_RS = product(q_ref[version, 0, 0, rows], k_ref[0, 0, 0], 1, head_axis)
                p_RS = jnp.where(seen, jnp.exp2(s_RS - lse_ref[0, 0, rows]), 0.0)
                columns_ref[0, 0, pl.ds(g, 1)] = p_RS.sum(axis=0, keepdims=True)
                room = jnp.concatenate([p_RS, jnp.zeros((ROWS, LANES), jnp.float32)], axis=1)
                moved = pltpu.roll(room, 0, 1, stride=1, stride_axis=0)
                diagonals_ref[0, 0, 0, pl.ds(g, 1)] = moved.sum(axis=0, keepdims=True)

    R = problem.rows
    return _walk(
        kernel, problem, interpret, "line_scores_sums",
        inputs=[pl.BlockSpec((1, 1, R, 1), lambda b, h, n, *_: (b, h, 0, 0))],
        out_specs=[
            pl.BlockSpec((1, 1, G, W), lambda b, h, n, *_: (b, h, 0, n)),
            pl.BlockSpec((1, 1, 1, G, problem.diagonals), lambda b, h, n, *_: (b, h, n, 0, 0)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((B, K, G, problem.tiles * W), jnp.float32),
            jax.ShapeDtypeStruct((B, K, problem.tiles, G, problem.diagonals), jnp.float32),
        ],
        scratch_shapes=[],
    )  # fmt: skip


def _version(problem: Problem, where_ref: Any, n: jax.Array) -> jax.Array | int:
    """The rotation of the queries that tile n needs."""
    if problem.versions == 1:
        return 0
    return (n >= where_ref[1]).astype(jnp.int32) + (n >= where_ref[2]).astype(jnp.int32)


def _walk(
    kernel: Any, problem: Problem, interpret: Any, name: str, *, inputs: list[Any], scratch_shapes: list[Any], **out: Any
) -> Callable[..., Any]:  # fmt: skip
    R, W, H = problem.rows, problem.block_kv, problem.head_dim
    across = flat(H)

    def keys(b: jax.Array, h: jax.Array, n: jax.Array, where_ref: Any, rows_ref: Any) -> tuple[Any, ...]:
        last = jnp.maximum(lax.div(rows_ref[2 * b + 1] + (W - 1), W) - 1, 0)
        tile = jnp.minimum(n, last)  # the last again is not copied again
        return where_ref[0], b, h, *((0, tile) if across else (tile, 0))

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(problem.batch, problem.kv_heads, problem.tiles),
            in_specs=[
                pl.BlockSpec((problem.versions, 1, 1, R, H), lambda b, h, n, *_: (0, b, h, 0, 0)),
                pl.BlockSpec((1, 1, 1, *((H, W) if across else (W, H))), keys),
                *inputs,
            ],
            out_specs=out["out_specs"],
            scratch_shapes=scratch_shapes,
        ),
        out_shape=out["out_shape"],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        name=name,
        interpret=interpret or False,
    )
