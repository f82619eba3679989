"""The cutoff kernel: a radix selection in shared memory, one block of 1,024 threads a row.

The cutoff is found digit by digit, highest first: a pass over the row counts the digits of all numbers that agree with the
digits found so far, and the digit at which the counts, from the top, reach what is wanted is the next one. Three passes find
the bits of the least score that is kept. If only some of those that tie with it may be kept, further passes find the last
place in the same way, over places counted from the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from qwen_jax.kernels import hopper_threads as threads
from qwen_jax.kernels.cutoffs.ranks import Heavy
from qwen_jax.kernels.hopper_threads import Int, Memory, choose

WIDTH = 4  # scores a load
_WARPGROUPS = 8
_THREADS = 128 * _WARPGROUPS
_UNROLLED = 8  # loads in flight a thread
_BITS = 11  # of the widest digit
RANK_DIGITS = ((20, 11), (10, 10), (0, 10))  # (lowest bit, bits)


def place_digits(size: int) -> tuple[tuple[int, int], ...]:
    """The digits of a place in a row of `size`, highest first: (lowest bit, bits)."""
    bits = max((size - 1).bit_length(), 1)
    ends = [*range(bits, 0, -_BITS), 0]
    return tuple((low, high - low) for high, low in itertools.pairwise(ends))


def cutoffs(
    arrays: int, rows: int, size: int, heavy: Heavy | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The kernel: (count int32[arrays * rows], arrays of scores float32[rows, size]) -> (least rank, last place) of each row.

    Both int32[arrays * rows], as `kernels.cutoffs.api.cutoffs` says. size is a multiple of WIDTH.
    """

    def kernel(count_ref: Any, *refs: Any) -> None:
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (1 + len(refs)))
        def block(_: Any, *refs: Any) -> None:
            count, *scores, least, last, counts, found = (Memory(ref) for ref in refs)
            at = Int(arith.index_cast(ir.IntegerType.get_signless(32), gpu.block_id(gpu.Dimension.x)))
            row = _Row(_row_pointer(scores, at, rows, size), size, heavy, counts, found)
            row.find(Int(count.load(at)), at, least, last)

        block(count_ref, *refs)

    return plgpu.kernel(
        kernel,
        kernel_name="cutoffs",
        out_type=[jax.ShapeDtypeStruct((arrays * rows,), jnp.int32)] * 2,
        scratch_types=[plgpu.SMEM((1 << _BITS,), jnp.int32), plgpu.SMEM((4,), jnp.int32)],
        grid=(arrays * rows,),
        grid_names=("block",),
        num_threads=_WARPGROUPS,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )


def _row_pointer(scores: Sequence[Memory], at: Int, rows: int, size: int) -> Any:
    pointer, row = scores[0].pointer, at
    for n, array in enumerate(scores[1:], start=1):
        here = Int(n * rows - 1) < at
        pointer, row = arith.select(here, array.pointer, pointer), choose(here, at - n * rows, row)
    i64 = ir.IntegerType.get_signless(64)
    offset = arith.muli(arith.extsi(i64, row.value), utils.c(size, i64))
    return llvm.getelementptr(
        pointer.type, pointer, [offset], [-(1 << 31)], ir.F32Type.get(), llvm.GEPNoWrapFlags.none
    )


class _Row:
    """One row of scores, its histogram in shared memory int32[1 << _BITS], and int32[4] for what one thread tells all."""

    def __init__(self, pointer: Any, size: int, heavy: Heavy | None, counts: Memory, found: Memory) -> None:
        self._pointer, self._size, self._heavy = pointer, size, heavy
        self._counts, self._found = counts, found
        self._thread = threads.in_block()

    def find(self, count: Int, at: Int, least: Memory, last: Memory) -> None:
        """Writes the row's results to entry `at`."""
        wanted, prefix, ties = count, Int(0), Int(0)
        for low, bits in RANK_DIGITS:
            prefix, wanted, ties = self._digit(
                prefix, wanted, low, bits, lambda rank, _: (rank, Int(-1) < rank)
            )
        rank = prefix
        # All ties are kept where they are as many as are wanted; a last digit of 0 was not counted.
        all_kept = wanted.equals(ties)
        some = scf.IfOp(all_kept, [ir.IntegerType.get_signless(32)], has_else=True)  # type: ignore[call-arg]
        with ir.InsertionPoint(some.then_block):
            scf.yield_([Int(self._size - 1).value])
        with ir.InsertionPoint(some.else_block):
            place, room = Int(0), wanted
            for low, bits in place_digits(self._size):
                place, room, _ = self._digit(
                    place,
                    room,
                    low,
                    bits,
                    lambda other, place: (Int(self._size - 1) - place, other.equals(rank)),
                )
            scf.yield_([(Int(self._size - 1) - place).value])
        with utils.when(self._thread.equals(0)):
            nothing = count < 1
            least.store(choose(nothing, (1 << 31) - 1, rank).value, at)
            last.store(choose(nothing, -1, Int(some.results[0])).value, at)

    def _digit(
        self, prefix: Int, wanted: Int, low: int, bits: int, number: Callable[[Int, Int], tuple[Int, Any]]
    ) -> tuple[Int, Int, Int]:
        """The next digit of the `wanted`-th largest number that starts with `prefix`, each counted as often as it weighs.

        number: (rank, place) of a score -> (number, does it take part).

        Returns:
            (the prefix with the digit, how many of those with that prefix are wanted, how many there are; 0 unless the digit is
            above 0: zeros are not counted, for there may be many, and nothing below them is ever wanted).
        """
        for n in range(0, 1 << bits, _THREADS):
            with utils.when(self._thread + n < 1 << bits):
                self._counts.store(Int(0).value, self._thread, n)
        gpu.barrier()

        def add(rank: Int, place: Int) -> None:
            value, takes_part = number(rank, place)
            digit = (value >> low) & ((1 << bits) - 1)
            counts = arith.andi(takes_part, Int(0) < digit)
            with utils.when(arith.andi(counts, (value >> (low + bits)).equals(prefix))):
                weight = choose(place < heavy.first, 1, heavy.weight) if (heavy := self._heavy) else Int(1)
                llvm.atomicrmw(
                    llvm.AtomicBinOp.add, self._counts.at(digit), weight.value, llvm.AtomicOrdering.monotonic
                )

        self._each_score(add)
        gpu.barrier()
        with utils.when(self._thread < 32):
            self._pick(wanted, 1 << bits)
        gpu.barrier()
        digit, rest, ties = (Int(self._found.load(n)) for n in range(3))
        return prefix * (1 << bits) + digit, rest, ties

    def _each_score(self, body: Callable[[Int, Int], None]) -> None:
        """body(rank, place) for this thread's part of the row."""
        loads = self._size // WIDTH
        vector_type = ir.VectorType.get((WIDTH,), ir.F32Type.get())
        i32 = ir.IntegerType.get_signless(32)

        @utils.fori(Int(-(-loads // (_THREADS * _UNROLLED))).value, [])
        def _(n: Any, __: Any) -> list[Any]:
            first = Int(n) * (_THREADS * _UNROLLED) + self._thread
            registers = []
            for step in range(_UNROLLED):
                at = first + step * _THREADS
                safe = choose(at < loads, at, loads - 1)
                place = utils.getelementptr(self._pointer, [safe.value], vector_type)
                registers.append((at, llvm.load(vector_type, place)))
            for at, register in registers:
                for entry in range(WIDTH):
                    score = arith.addf(threads.element(register, entry), threads.f32(0.0))  # -0 becomes 0
                    body(choose(at < loads, Int(arith.bitcast(i32, score)), -1), at * WIDTH + entry)
            return []

    def _pick(self, wanted: Int, size: int) -> None:
        """One warp: (digit, how many of it are wanted, how many there are) to `found`."""
        lane, each = self._thread, size // 32

        def count(place: Int) -> Int:
            return Int(self._counts.load(lane * each + (place & (each - 1))))

        @utils.fori(Int(each).value, [Int(0).value])
        def mine(n: Any, carry: list[Any]) -> list[Any]:
            return [(Int(carry[0]) + count(Int(n) + lane)).value]  # each lane from another bank on

        above = Int(mine.results[0])  # of this lane and those after it
        for distance in (1, 2, 4, 8, 16):
            other = above.of_lane(lane + distance)
            above = above + choose(lane + distance < 32, other, 0)
        total = above.of_lane(Int(0))
        nothing_yet = [(above - Int(mine.results[0])).value, Int(-1).value, Int(0).value, Int(0).value]

        @utils.fori(Int(each).value, nothing_yet)
        def walk(n: Any, carry: list[Any]) -> list[Any]:
            before, digit, rest, ties = (Int(x) for x in carry)
            place = Int(each - 1) - Int(n)
            here = count(place)
            after = before + here
            hit = arith.andi(before < wanted, wanted <= after)
            return [
                after.value, choose(hit, lane * each + place, digit).value, choose(hit, wanted - before, rest).value,
                choose(hit, here, ties).value,
            ]  # fmt: skip

        _, digit, rest, ties = (Int(x) for x in walk.results)

        def tell(*values: Int) -> None:
            for n, value in enumerate(values):
                self._found.store(value.value, n)

        with utils.when(Int(-1) < digit):
            tell(digit, rest, ties)
        with utils.when(arith.andi(lane.equals(0), total < wanted)):
            tell(Int(0), wanted - total, Int(0))
