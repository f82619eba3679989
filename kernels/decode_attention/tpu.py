"""The TPU decode kernel, in Pallas Mosaic TPU: every row's keys and values are read once, tile by tile, all KV heads together.

A tile of keys passes the matrix unit as its stationary operand; the few queries of a KV head stream over it, so scores stand
rows x keys and a cache's factors, one a key, lie along lanes as they do in memory. Work a tile is small beside its copy.
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
from qwen_jax.kernels.tpu import LANES, LN2, MASKED, NOTHING_YET, alignment, flat, positions

QUERY_ROWS = 16  # rows of a bfloat16 tile; the query heads of a KV head are padded to a multiple
_SLOTS = 2
_VMEM_LIMIT = 48 * 2**20


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call; versions = rotations of the queries: 3 with dual chunk attention, else 1.

    rows: query heads a KV head, padded. original: tokens from which on generated keys have a temperature, 0 for none.
    shares: parts of the keys that may run side by side, on the cores of one device. capacity: slots of the cache. blocks:
    which positions the slots hold; None: all, in order.
    """

    versions: int
    batch: int
    kv_heads: int
    rows: int
    capacity: int
    head_dim: int
    original: int
    cache: str
    shares: int
    blocks: Blocks | None = None

    @property
    def quantised(self) -> bool:
        """Whether the cache has 8 bits and a float32 factor a key and head."""
        return jnp.dtype(self.cache).itemsize == 1


def decode(
    problem: Problem, block_kv: int, dtype: Any, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of these shapes: (where, rows, warmth, q, k, v[, k_scale, v_scale]) -> (out, lse), one part a share.

    where: int32[2], (layer, rank among the blocks). rows: int32[5 * B], of every row (position, prompt length, first tile of
    SUCC keys, of INTRA keys, tiles that hold keys it sees). warmth: float32[B], the temperature of prompt keys, which the
    queries hold already. q: [B, versions, K, R, H], versions in key order, scaled so that q . k is a base-2 exponent.
    k, v: [L, B, K, S, H], or [L, B, K, H, S] where they lie so (`tpu.flat`); scales float32 [L, B, K, S]. out: float32
    [B, shares, K, R, H], each part normalised; lse: float32 [B, shares, K, R, 128], natural, the same in all lanes.
    """
    B, K, R, H, S = problem.batch, problem.kv_heads, problem.rows, problem.head_dim, problem.capacity
    aligned = LANES if problem.quantised else alignment(H)  # factors are copied along lanes
    across = flat(H)
    keys_axis, head_axis = (1, 0) if across else (0, 1)  # of a tile

    def kernel(
        where_ref: Any, rows_ref: Any, warmth_ref: Any, q_ref: Any, *refs: Any
    ) -> None:  # fmt: skip
        sources = refs[: 4 if problem.quantised else 2]
        out_ref, lse_ref = refs[len(sources) : len(sources) + 2]
        buffers, (acc, peak, total, arrived) = refs[len(sources) + 2 : -4], refs[-4:]
        b, share = pl.program_id(0), pl.program_id(1)
        position, prompt, succ, intra, tiles = (rows_ref[5 * b + n] for n in range(5))
        # Shares take turns: share c has tiles c, c + shares, ...
        visits = lax.div(tiles - share + (problem.shares - 1), problem.shares)

        def start(n: jax.Array) -> jax.Array:
            # The last tile may overhang the cache: it is copied from further left.
            return pl.multiple_of(jnp.minimum(n * block_kv, S - block_kv), aligned)

        def copies(visit: jax.Array) -> list[Any]:
            slot = lax.rem(visit, _SLOTS)
            keys = pl.ds(start(visit * problem.shares + share), block_kv)
            before = [(slice(None),) * (2 if across and n < 2 else 1) for n in range(len(sources))]
            return [
                pltpu.make_async_copy(
                    source.at[(where_ref[0], b, *before[n], keys)],
                    buffer.at[slot],
                    arrived.at[slot, n],
                )
                for n, (source, buffer) in enumerate(zip(sources, buffers, strict=True))
            ]

        peak[...] = jnp.full_like(peak, NOTHING_YET)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

        def start_copies(m: jax.Array) -> None:
            @pl.when(m < visits)
            def _() -> None:
                for copy in copies(m):
                    copy.start()

        start_copies(jnp.int32(0))

        def visit(m: jax.Array, _: None) -> None:
            slot = lax.rem(m, _SLOTS)
            start_copies(m + 1)
            for copy in copies(m):
                copy.wait()
            n = m * problem.shares + share
            slot_1S = lax.broadcasted_iota(jnp.int32, (1, block_kv), 1) + start(n)
            j_1S = positions(slot_1S, problem.blocks, where_ref[1])
            seen_1S = (j_1S <= position) & (slot_1S >= n * block_kv)
            warmth_1S = _warmth(j_1S, prompt, warmth_ref[b], problem.original)
            version = 0 if problem.versions == 1 else jnp.where(n < succ, 0, jnp.where(n < intra, 1, 2))
            for k in range(K):
                keys, values = (buffers[x][slot, k].astype(dtype) for x in range(2))
                s_RS = _product(q_ref[0, version, k], keys, head_axis)
                if problem.quantised:
                    s_RS = s_RS * buffers[2][slot, k][None]
                if warmth_1S is not None:
                    s_RS = s_RS * warmth_1S
                s_RS = jnp.where(seen_1S, s_RS, MASKED)
                old = peak[k]
                new = jnp.maximum(old, s_RS.max(axis=1, keepdims=True))
                p_RS = jnp.exp2(s_RS - new[:, :1])
                shrink = jnp.exp2(old - new)
                peak[k] = new
                total[k] = total[k] * shrink + p_RS.sum(axis=1, keepdims=True)
                if problem.quantised:
                    p_RS = p_RS * buffers[3][slot, k][None]
                acc[k] = acc[k] * shrink[:, :1] + _product(p_RS.astype(dtype), values, keys_axis)

        lax.fori_loop(0, visits, visit, None)
        sums = total[...]
        out_ref[0, 0] = acc[...] / jnp.where(sums == 0, 1.0, sums)[..., :1]
        lse_ref[0, 0] = (peak[...] + jnp.log2(sums)) * LN2

    tile, factors = (H, block_kv) if across else (block_kv, H), (_SLOTS, K, block_kv)
    cache_dtype = jnp.dtype(problem.cache)
    scales = [pltpu.VMEM(factors, jnp.float32)] * (2 if problem.quantised else 0)
    part = (B, problem.shares, K, R)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, problem.shares),
            in_specs=[
                pl.BlockSpec((1, problem.versions, K, R, H), lambda b, c, *_: (b, 0, 0, 0, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * (2 + len(scales)),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, K, R, H), lambda b, c, *_: (b, c, 0, 0, 0)),
                pl.BlockSpec((1, 1, K, R, LANES), lambda b, c, *_: (b, c, 0, 0, 0)),
            ],
            scratch_shapes=[
                *[pltpu.VMEM((_SLOTS, K, *tile), cache_dtype)] * 2,
                *scales,
                pltpu.VMEM((K, R, H), jnp.float32),
                pltpu.VMEM((K, R, LANES), jnp.float32),
                pltpu.VMEM((K, R, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((_SLOTS, 2 + len(scales))),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*part, H), jnp.float32),
            jax.ShapeDtypeStruct((*part, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_LIMIT
        ),
        name="decode_attention",
        interpret=interpret or False,
    )


def _warmth(j_1S: jax.Array, prompt: jax.Array, warmth: jax.Array, original: int) -> jax.Array | None:
    """float32[1, S]: what a key's temperature is of the prompt keys' (`algorithms.md` 3.2); None where there is none."""
    if original == 0:
        return None
    length = jnp.maximum(j_1S + 1, original).astype(jnp.float32)
    own = 1.0 + 0.1 * jnp.log(length / original)
    return jnp.where(j_1S < prompt, 1.0, own / warmth)


def _product(a: jax.Array, b: jax.Array, b_axis: int) -> jax.Array:
    """a times b over a's last axis and this axis of b, accumulated in float32."""
    return lax.dot_general(a, b, (((1,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32)
