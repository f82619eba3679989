"""Compacts keys and values that lie along lanes, in Pallas Mosaic TPU: a column of the cache is then one lane of every row.

XLA gathers rows: to gather along lanes it copies the whole cache, at twice its size. Here the 128 positions around a column are
copied as they lie, its lane is rolled to where it belongs, and the other lanes keep theirs. Columns that follow one another
within the same 128 positions share one copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.kernels.tpu import LANES

_AHEAD = 16  # columns whose copies are begun before they are used
_TOGETHER = 8  # columns that are moved side by side
_SLOTS = 32  # more than _AHEAD + _TOGETHER: a slot is read while so many later ones are begun; a power of two


def compact(
    batch: int, heads: int, columns: int, width: int, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of these shapes: (layer, tiles, position, k, v) -> (keys, values), [X, H, P]; X = batch * heads, P = columns.

    layer: int32[1]. tiles: int32[X], how many tiles of `width` columns are wanted; the others may hold anything. position:
    int32[X, 1, P], inside the cache. k, v: [L, B, K, H, S], S a multiple of LANES. width: a divisor of P, a multiple of LANES.
    """

    def kernel(
        layer_ref: Any, tiles_ref: Any, position_ref: Any, k_ref: Any, v_ref: Any, k_out_ref: Any, v_out_ref: Any,
        k_slabs: Any, v_slabs: Any, arrived: Any,
    ) -> None:  # fmt: skip
        b, head, first = pl.program_id(0), pl.program_id(1), pl.program_id(2) * width
        at = layer_ref[0], b, lax.div(head, heads // k_ref.shape[2])
        lane = lax.broadcasted_iota(jnp.int32, (k_ref.shape[3] // 2, LANES), 1)

        def slab(column: jax.Array) -> jax.Array:
            return position_ref[0, 0, first + column] >> (LANES.bit_length() - 1)

        def is_new(column: jax.Array) -> jax.Array:
            """Whether this column does not share the copy of the one before."""
            return (column == 0) | (slab(column) != slab(jnp.maximum(column - 1, 0)))

        def copies(column: jax.Array, number: jax.Array) -> list[Any]:
            slot = number & (_SLOTS - 1)
            lanes = pl.ds(pl.multiple_of(slab(column) * LANES, LANES), LANES)
            return [
                pltpu.make_async_copy(ref.at[(*at, slice(None), lanes)], slabs.at[slot], arrived.at[slot])
                for ref, slabs in ((k_ref, k_slabs), (v_ref, v_slabs))
            ]

        def begin(column: jax.Array, begun: jax.Array) -> jax.Array:
            """Begins the copies of a column, the `begun`th; returns how many have begun then."""
            inside = jnp.minimum(column, width - 1)
            needed = (column < width) & is_new(inside)

            @pl.when(needed)
            def _() -> None:
                for copy in copies(inside, begun):
                    copy.start()

            return begun + needed.astype(jnp.int32)

        def visit(group: int, n: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            """The n-th columns of a group, so many as are taken together; carry: what is found, copies begun and used."""
            found_k, found_v, begun, used = carry
            places = []
            for x in range(_TOGETHER):
                place = n * _TOGETHER + x
                column = group * LANES + place
                begun = begin(column + _AHEAD, begun)
                new = is_new(column)

                @pl.when(new)
                def _(column: jax.Array = column, used: jax.Array = used) -> None:
                    for copy in copies(column, used):
                        copy.wait()

                used += new.astype(jnp.int32)
                shift = (place - position_ref[0, 0, first + column]) & (LANES - 1)
                places.append((place, (used - 1) & (_SLOTS - 1), shift))
            # Without branches: a roll's result comes long after, and meanwhile others begin.
            for place, slot, shift in places:
                k, v = (
                    pltpu.roll(pltpu.bitcast(slabs[slot], jnp.int32), shift, axis=1)
                    for slabs in (k_slabs, v_slabs)
                )
                found_k, found_v = jnp.where(lane == place, k, found_k), jnp.where(lane == place, v, found_v)
            return found_k, found_v, begun, used

        @pl.when(pl.program_id(2) < tiles_ref[b * heads + head])
        def _() -> None:
            begun, used = lax.fori_loop(0, _AHEAD, begin, jnp.int32(0)), jnp.int32(0)
            for group in range(width // LANES):
                nothing = jnp.zeros(lane.shape, jnp.int32)
                k, v, begun, used = lax.fori_loop(
                    0, LANES // _TOGETHER, functools.partial(visit, group), (nothing, nothing, begun, used)
                )
                lanes = pl.ds(group * LANES, LANES)
                k_out_ref[0, :, lanes] = pltpu.bitcast(k, k_out_ref.dtype)
                v_out_ref[0, :, lanes] = pltpu.bitcast(v, v_out_ref.dtype)

    def call(
        layer: jax.Array, tiles: jax.Array, position: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        H = k.shape[3]
        out = pl.BlockSpec((1, H, width), lambda b, n, p, *_: (b * heads + n, 0, p))
        found = jax.ShapeDtypeStruct((batch * heads, H, columns), k.dtype)
        keys, values = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(batch, heads, columns // width),
                in_specs=[
                    pl.BlockSpec(
                        (1, 1, columns), lambda b, n, p, *_: (b * heads + n, 0, 0), memory_space=pltpu.SMEM
                    ),
                    pl.BlockSpec(memory_space=pl.ANY),
                    pl.BlockSpec(memory_space=pl.ANY),
                ],
                out_specs=[out, out],
                scratch_shapes=[
                    pltpu.VMEM((_SLOTS, H, LANES), k.dtype),
                    pltpu.VMEM((_SLOTS, H, LANES), k.dtype),
                    pltpu.SemaphoreType.DMA((_SLOTS,)),
                ],
            ),
            out_shape=[found, found],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name="compact_columns",
            interpret=interpret or False,
        )(layer, tiles, position, k, v)
        return keys, values

    return call
