"""The Hopper kernel of mixed rotations, in Pallas Mosaic GPU: queries are read, and written in every rotation, once.

XLA's way to the same numbers writes them as pairs, for the product that mixes, and reads them again: three times
the bytes. Here a warpgroup holds 64 positions of one head in registers, in float32; rotated and taken apart they are the left
operand of the product as they lie. It keeps its sines for all heads. Blocks of the same positions in other rotations run side
by side, so that queries come out of L2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from qwen_jax.kernels.hopper import tiled
from qwen_jax.kernels.hopper_rows import LAYOUT
from qwen_jax.kernels.hopper_walk import ROWS
from qwen_jax.kernels.mixing import in_two

_WGS = 2  # warpgroups, of ROWS positions each
_SLOTS = 2  # heads of queries on their way in, and out


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call; versions = rotations of the queries. shared: whether all rows of the batch have the same sines."""

    versions: int
    batch: int
    queries: int
    heads: int
    head_dim: int
    shared: bool


def mixed_rotations(problem: Problem, dtype: Any, interpret: Any = None) -> Callable[..., jax.Array]:
    """The kernel of these shapes: (matrix [H, H], cos, sin, q bfloat16[B, T, N, H]) -> [versions * B, T, N, H].

    cos and sin: float32[versions * B, T, H / 2], or [versions, T, H / 2] where they are shared. T is a multiple of 8.
    dtype: bfloat16 or float16, of the matrix and of what comes out.
    """
    P, B, T, N, H = problem.versions, problem.batch, problem.queries, problem.heads, problem.head_dim
    half = H // 2

    def kernel(
        matrix_ref: Any, cos_ref: Any, sin_ref: Any, q_ref: Any, out_ref: Any,
        matrix_smem: Any, sines_smem: Any, q_smem: Any, o_smem: Any, matrix_full: Any, sines_full: Any, q_full: Any,
    ) -> None:  # fmt: skip
        wg, item = lax.axis_index("wg"), lax.axis_index("item")
        version, rest = lax.rem(item, P), lax.div(item, P)
        b, t = lax.rem(rest, B), (lax.div(rest, B) * _WGS + wg) * ROWS
        rows = pl.ds(t, ROWS)

        def slot_of(head: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The slot of a head's queries and outputs, and its barrier."""
            slot = lax.rem(head, jnp.int32(_SLOTS))
            return slot, wg * _SLOTS + slot

        def load(head: jax.Array) -> None:
            slot, barrier = slot_of(head)
            for part in range(2):
                source = q_ref.at[b, rows, head, pl.ds(part * half, half)]
                plgpu.copy_gmem_to_smem(source, q_smem.at[wg, slot, part], q_full.at[barrier])

        def mixed(turned: tuple[jax.Array, ...]) -> jax.Array:
            """float32 [ROWS, H] of the two halves [ROWS, H / 2]."""
            if interpret:  # which knows no products of registers
                parts = [in_two(x, dtype) for x in turned]
                return sum(
                    jnp.dot(x, matrix_smem[n * half : (n + 1) * half], preferred_element_type=jnp.float32)
                    for n, part in enumerate(parts)
                    for x in part
                )  # type: ignore[return-value]
            # `in_two` by Mosaic's conversions, which stand as they are written; it has no reduce_precision.
            high = [x.astype(dtype) for x in turned]
            low = [(x - h.astype(jnp.float32)).astype(dtype) for x, h in zip(turned, high, strict=True)]
            # Registers are written before products read them.
            high, low = lax.optimization_barrier((high, low))

            def product(acc: Any) -> jax.Array:
                for part in (high, low):
                    for n, x in enumerate(part):
                        plgpu.wgmma(acc, x, matrix_smem.at[pl.ds(n * half, half)])
                return acc[...]

            return pl.run_scoped(product, plgpu.ACC((ROWS, H), jnp.float32))

        def one(head: jax.Array, _: None) -> None:
            slot, barrier = slot_of(head)
            plgpu.barrier_wait(q_full.at[barrier])
            first, second = (
                plgpu.load(q_smem.at[wg, slot, n], layout=LAYOUT).astype(jnp.float32) for n in range(2)
            )
            # Before a copy jax has the warpgroup meet: all have read the slot.
            pl.when(head + _SLOTS < N)(lambda: load(head + _SLOTS))
            cos, sin = (plgpu.load(sines_smem.at[wg, n], layout=LAYOUT) for n in range(2))
            out = mixed((first * cos - second * sin, second * cos + first * sin))
            plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)  # what lay in the slot has left
            o_smem[wg, slot] = out.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem.at[wg, slot], out_ref.at[version * B + b, rows, head])

        @pl.when(wg == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(matrix_ref, matrix_smem, matrix_full)

        of_row = version if problem.shared else version * B + b
        for n, source in enumerate((cos_ref, sin_ref)):
            plgpu.copy_gmem_to_smem(source.at[of_row, rows], sines_smem.at[wg, n], sines_full.at[wg])
        for head in range(min(_SLOTS, N)):
            load(jnp.int32(head))
        plgpu.barrier_wait(matrix_full)
        plgpu.barrier_wait(sines_full.at[wg])
        lax.fori_loop(0, N, one, None)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        kernel_name="mixed_rotations",
        out_type=jax.ShapeDtypeStruct((P * B, T, N, H), dtype),
        scratch_types=[
            plgpu.SMEM((H, H), dtype, transforms=tiled(2, H)),
            plgpu.SMEM((_WGS, 2, ROWS, half), jnp.float32, transforms=tiled(4, half)),
            plgpu.SMEM((_WGS, _SLOTS, 2, ROWS, half), jnp.bfloat16, transforms=tiled(2, half)),
            plgpu.SMEM((_WGS, _SLOTS, ROWS, H), dtype, transforms=tiled(2, H)),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=2, num_barriers=_WGS),
            plgpu.Barrier(num_arrivals=2, num_barriers=_WGS * _SLOTS),
        ],
        grid=(P * B * pl.cdiv(T, _WGS * ROWS),),
        grid_names=("item",),
        num_threads=_WGS,
        thread_name="wg",
        interpret=interpret,
    )  # fmt: skip
