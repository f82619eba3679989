"""The Hopper decode kernel for 8-bit caches: keys split over warpgroups, whose warps walk them each on its own.

A block has a few consumer warpgroups, each with shares and a ring of its own (`hopper_workers`), and one producer
warpgroup, a warp of which keeps one ring full. A slot of a ring holds keys, values and both their factors, and has one barrier:
every lane of a warp arrives at it. Shares of a row are merged by log-sum-exp afterwards.
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

from qwen_jax.kernels.decode_attention.hopper_workers import HEADS, LSE_ROW, WORKERS, State, Workers
from qwen_jax.kernels.decode_attention.split import Problem, Split, Tiling
from qwen_jax.kernels.hopper import Held, multiprocessors, tiled
from qwen_jax.kernels.hopper_rows import ROW

_LN2 = 0.6931471805599453
_PRODUCER_REGISTERS = 40


def decode(
    problem: Problem, tiling: Tiling, interpret: Any = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel of these shapes: (where, rows, cooling, unit, q, k, v, k_scale, v_scale) -> (out, lse).

    where: int32[2], (layer, rank). rows: int32[4 * B], as `Split` wants it. cooling: float32[B], for each row 1 / the
    temperature of prompt keys. q: `hopper_workers.arranged` of [versions * B * K, HEADS, H], versions in key order, scaled so
    that unit * q . k of a prompt key is a base-2 exponent. unit: float32[B * K]. k, v: [L * B * K, S, H]; their scales
    [L * B * K, S] float32. out float32 [B * K * shares, H / 8, 64] and lse float32 [B * K * shares, LSE_ROW] as
    `Workers.finish` leaves them, but for Workers.unit in out; shares of a (row, KV head) are consecutive.
    """
    H, keys, stages, teams = problem.head_dim, tiling.block_kv, tiling.stages, tiling.walks
    split = functools.partial(Split, problem, tiling)
    items = split(None, None, 1).items
    blocks = min(multiprocessors(), pl.cdiv(items, teams))
    workers = Workers(H, jnp.dtype(problem.cache), bool(interpret))
    dca = problem.versions == 3

    def kernel(
        where_ref: Any, rows_ref: Any, cooling_ref: Any, unit_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any,
        k_scale_ref: Any, v_scale_ref: Any, out_ref: Any, lse_ref: Any, k_smem: Any, v_smem: Any,
        k_scale_smem: Any, v_scale_smem: Any, out_smem: Any, lse_smem: Any, meeting: Any, full: Any, free: Any,
    ) -> None:  # fmt: skip
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        held = Held(problem.blocks, where_ref[1], keys)
        shares = split(held, rows_ref, blocks * teams)

        def slot(team: jax.Array, n: jax.Array) -> jax.Array:
            """Where the n-th tile of a team lies."""
            return team * stages + lax.rem(n, jnp.int32(stages))

        def consume(team: jax.Array, n: jax.Array, first: jax.Array) -> jax.Array:
            """One share. `first` counts the tiles this team has consumed before."""
            b, pair, lo, hi = shares.item(n)
            succ, intra = shares.stage_tiles(b)
            position, prompt_len = rows_ref[4 * b], rows_ref[4 * b + 1]
            cooling, unit = cooling_ref[b], unit_ref[pair]
            plain = jnp.minimum(position + 1, prompt_len) if problem.original else position + 1
            unmasked = lax.div(held.below(plain), keys)

            def step(j: jax.Array, state: State, queries: jax.Array, masked: bool) -> State:
                at = slot(team, first + (j - lo))
                plgpu.barrier_wait(full.at[at])
                scale = plgpu.load(k_scale_smem.at[at], layout=ROW) * unit
                factor = plgpu.load(v_scale_smem.at[at], layout=ROW)
                bias = None
                if masked:
                    key = plgpu.broadcasted_iota(jnp.int32, (keys,), 0, layout=ROW) + held.start(j)
                    bias = jnp.where(key <= position, 0.0, -jnp.inf)
                    if problem.original:
                        length = jnp.maximum(key + 1, problem.original).astype(jnp.float32)
                        own = (1 + 0.1 * _LN2 * jnp.log2(length * (1 / problem.original))) * cooling
                        scale = scale * jnp.where(key < prompt_len, 1.0, own)
                state = workers.step(state, queries, k_smem.at[at], v_smem.at[at], scale, factor, bias)
                plgpu.barrier_arrive(free.at[at])
                return state

            def stage(version: jax.Array, state: State) -> State:
                """The tiles that meet the queries in one rotation."""
                queries = workers.queries(q_ref, version * problem.pairs + pair)
                start = jnp.where(version == 0, 0, jnp.where(version == 1, succ, intra)) if dca else lo
                end = jnp.where(version == 0, succ, jnp.where(version == 1, intra, hi)) if dca else hi
                start, end = jnp.maximum(start, lo), jnp.minimum(end, hi)
                for begin, until, masked in (
                    (start, jnp.minimum(end, unmasked), False),
                    (jnp.maximum(start, unmasked), end, True),
                ):
                    state = lax.fori_loop(
                        begin, until, functools.partial(step, queries=queries, masked=masked), state
                    )
                return state

            state = lax.fori_loop(0, problem.versions, stage, workers.start())
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the share before has left out and lse
            workers.finish(state, out_smem.at[team], lse_smem.at[team], meeting.at[team])
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[team], out_ref.at[n])
            plgpu.copy_smem_to_gmem(lse_smem.at[team], lse_ref.at[n])
            return first + hi - lo

        def produce(team: jax.Array, n: jax.Array, first: jax.Array) -> jax.Array:
            """Loads the tiles of one share."""
            _, pair, lo, hi = shares.item(n)
            source = where_ref[0] * problem.pairs + pair

            def load(j: jax.Array, _: None) -> None:
                count = first + (j - lo)
                at = slot(team, count)
                pl.when(count >= stages)(lambda: plgpu.barrier_wait(free.at[at]))
                for ref, smem in (
                    (k_ref, k_smem), (k_scale_ref, k_scale_smem), (v_ref, v_smem), (v_scale_ref, v_scale_smem),
                ):  # fmt: skip
                    plgpu.copy_gmem_to_smem(ref.at[source, pl.ds(j * keys, keys)], smem.at[at], full.at[at])

            lax.fori_loop(lo, hi, load, None)
            return first + hi - lo

        @pl.when(wg < teams)
        def _consume() -> None:
            registers = (512 - _PRODUCER_REGISTERS) // teams // 8 * 8
            plgpu.set_max_registers(min(240, registers), action="increase")
            shares.run(block * teams + wg, functools.partial(consume, wg))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == teams)
        def _produce() -> None:
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _(warp: jax.Array) -> None:
                @pl.when(warp < teams)
                def _() -> None:
                    shares.run(block * teams + warp, functools.partial(produce, warp))

    slots = teams * stages
    tile = plgpu.SMEM((slots, keys, H), problem.cache, transforms=tiled(1, H))
    factors = plgpu.SMEM((slots, keys), jnp.float32)
    return plgpu.kernel(
        kernel,
        kernel_name="decode_attention_8_bit",
        out_type=[
            jax.ShapeDtypeStruct((items, H // 8, 64), jnp.float32),
            jax.ShapeDtypeStruct((items, LSE_ROW), jnp.float32),
        ],
        scratch_types=[
            tile, tile, factors, factors,
            plgpu.SMEM((teams, H // 8, 64), jnp.float32), plgpu.SMEM((teams, LSE_ROW), jnp.float32),
            plgpu.SMEM((teams, 2 * WORKERS * HEADS), jnp.float32),
            plgpu.Barrier(num_barriers=slots, num_arrivals=4), plgpu.Barrier(num_barriers=slots),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=teams + 1,
        thread_name="wg",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )  # fmt: skip
