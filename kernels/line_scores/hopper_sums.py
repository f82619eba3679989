"""Column and diagonal sums of one tile of attention, 64 keys by 64 queries, held in a wgmma accumulator.

Keys are rows here. Thread (warp w, lane 4 g + t) holds keys 16 w + g + 8 h, h = 0, 1, and queries 8 i + 2 t + e, e = 0, 1. A
column of attention is a row here: a sum over i and e, registers of a thread, and over the four lanes t. Along a diagonal
query - key is the same. Within a thread that is i - h: it adds its two rows into 9 pairs. What is left are threads g = 0 .. 7
whose sums lie g apart; they go to shared memory, a row each, and come back shifted. Each warp then has the 79 sums of its
diagonals, and the four warps, 16 apart, meet in the same way.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from qwen_jax.kernels import hopper_threads as threads
from qwen_jax.kernels.hopper_rows import LAYOUT
from qwen_jax.kernels.hopper_threads import Int, Memory

TILE = 64  # keys, and queries
DIAGONALS = 128  # query - key from 63 down to -63, and one place that stays 0

_LANE_ROW = 88  # floats of a lane group's row: 72 sums, then zeros, on which lanes of other rows fall
_LANE_ROWS_AT = 16
_WARP_ROW = 128  # a warp's: 79 sums, then zeros
_WARP_ROWS_AT = 64
LANE_FLOATS = _LANE_ROWS_AT + 32 * _LANE_ROW
WARP_FLOATS = _WARP_ROWS_AT + 4 * _WARP_ROW


def clear(*refs: Any) -> None:
    """A warpgroup fills its float32 arrays of one dimension with zeros."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))
    def zeros(_: Any, *refs: Any) -> None:
        thread = threads.in_block() & 127
        for ref in refs:
            (size,) = ref.type.shape
            for first in range(0, size, 128):
                at = thread + first
                Memory(ref).store(threads.f32(0.0), threads.choose(at < size, at, size - 1))
        utils.warpgroup_barrier()

    zeros(*refs)


def add_up(p: jax.Array, lanes: Any, warps: Any, columns: Any, diagonals: Any, interpret: bool) -> None:
    """Writes the sums of p float32[keys, queries].

    Args:
        lanes, warps: shared memory of this warpgroup, float32[LANE_FLOATS] and float32[WARP_FLOATS], zero at first. A
            call's `warps` must not be that of the call before.
        columns: float32[TILE], gets the sum over queries of every key.
        diagonals: float32[DIAGONALS], entry x gets the sum over query - key = 63 - x.
    """
    if interpret:
        columns[...] = p.sum(axis=1)
        # Rows padded by as much as they are long, and re-read one shorter, move right by one more each.
        rows = jnp.pad(p[:, ::-1], ((0, 0), (0, TILE))).reshape(-1)[:-TILE].reshape(TILE, DIAGONALS - 1)
        diagonals[...] = jnp.pad(rows.sum(axis=0), (0, 1))
        return

    @plgpu.inline_mgpu(arg_types=(LAYOUT, *[plgpu.RefType()] * 4))
    def sums(_: Any, p: Any, *refs: Any) -> None:
        rows = [list(p.registers[0, :, 0, 0, h].flat) for h in range(2)]
        lanes, warps, columns, diagonals = (Memory(ref) for ref in refs)
        _columns(rows, columns)
        _diagonals(rows, lanes, warps, diagonals)

    sums(p, lanes, warps, columns, diagonals)


def _thread() -> tuple[Int, Int, Int, Int]:
    """(warp w of the warpgroup, lane, lane's group g, place t in the group)."""
    thread = threads.in_block()
    lane = thread & 31
    return (thread >> 5) & 3, lane, lane >> 2, lane & 3


def _columns(rows: list[list[Any]], columns: Memory) -> None:
    w, _, g, t = _thread()
    sums = []
    for row in rows:
        pair = threads.total(row)
        sum_ = arith.addf(threads.element(pair, 0), threads.element(pair, 1))
        for distance in (1, 2):
            sum_ = arith.addf(sum_, utils.shfl_bfly(sum_, distance))
        sums.append(sum_)
    with utils.when(t < 2):
        columns.store(arith.select(t.equals(0), *sums), w * 16 + t * 8 + g)


def _diagonals(rows: list[list[Any]], lanes: Memory, warps: Memory, diagonals: Memory) -> None:
    w, lane, g, t = _thread()
    upper, lower = rows
    pairs = [lower[0], *(arith.addf(a, b) for a, b in zip(upper[:-1], lower[1:], strict=True)), upper[-1]]
    at = w * (8 * _LANE_ROW) + g * _LANE_ROW + t * 2
    for n, pair in enumerate(pairs):  # of query - (key of g = 0, h = 0) = 8 n - 8 + 2 t + e
        lanes.store(pair, at, _LANE_ROWS_AT + 8 * n)
    threads.sync_warp()
    at = w * (8 * _LANE_ROW) + lane
    for n in range(3):  # the warp's diagonal 32 n + lane - 15
        rows_at = _LANE_ROWS_AT - 7 + 32 * n
        sum_ = threads.total([lanes.load(at, rows_at + row * (_LANE_ROW + 1)) for row in range(8)])
        if n == 2:  # lanes past the last diagonal
            sum_ = arith.select(lane < 15, sum_, threads.f32(0.0))
        warps.store(sum_, w * _WARP_ROW + lane, _WARP_ROWS_AT + 32 * n)
    utils.warpgroup_barrier()
    x = w * 32 + lane
    at = Int(_WARP_ROWS_AT + 78) - x
    diagonals.store(threads.total([warps.load(at, warp * (_WARP_ROW + 16)) for warp in range(4)]), x)
