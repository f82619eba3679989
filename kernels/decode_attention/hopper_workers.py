"""The walk of decode attention over 8-bit keys and values: each warp is a worker with keys and a softmax of its own.

Nothing passes through shared memory but the bytes as they lie in the cache, and no warp waits for another: of every 64
keys of a tile a worker takes 16. S = K Q^T by mma.sync: of every 64 rows of S [keys, 8 heads] it holds 16, as a wgmma
accumulator would. Transposed in registers, P is the right operand of O^T += V^T P^T. Both products may take their sum in any
order, so a lane reads 16 bytes at a time: of keys, a quarter of the channels of rows g and g + 8 (lane 4 g + q); of values, an
eighth of the channels of the four keys that the fragment of V^T wants. Both are free of bank conflicts with 128 channels.

P is rounded to float16 after the values' factors have been multiplied in, so each worker's reference m is the maximum of
score + log2(factor), less HEADROOM. It is only looked for when a weight passes LARGEST: a worker then takes its exponentials
again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, math, nvvm, scf

from qwen_jax.kernels import hopper_bytes as bytes_
from qwen_jax.kernels import hopper_threads as threads
from qwen_jax.kernels.hopper import tiled
from qwen_jax.kernels.hopper_bytes import E4m3, Int8
from qwen_jax.kernels.hopper_rows import LAYOUT, ROW
from qwen_jax.kernels.hopper_threads import Int, Memory, elements, pairs

HEADS = 8  # columns of S: the query heads of a KV head, padded
WORKERS = 4  # warps of a warpgroup
KEYS = 64  # that they take together in one go
LSE_ROW = 32  # floats that a part's log-sum-exps take, of which HEADS count

HEADROOM = 4.0  # exponents between m and the largest exponent known
LARGEST = 2.0**14  # weights that float16 is to hold
LEAST_FACTOR = 2.0**-64  # smaller factors of values, like 0, count as this
NOTHING_YET = -3e38  # m of a worker that has seen no key

State = tuple[jax.Array, jax.Array, jax.Array]  # acc, m, l


@dataclasses.dataclass(frozen=True)
class Workers:
    """Four workers, the warps of a warpgroup.

    Their state: acc float32 [4 H, HEADS] = the sum of exp2(x - m) v f over a worker's keys, row 64 i + 16 w + 8 h + g for
    worker w and channel g H / 8 + 2 i + h (i < H / 16; h < 2; g < 8); m float32 [64, HEADS], the reference of worker w in its
    rows 16 w to 16 w + 15, which are equal; l float32 [64, HEADS] = the sum of exp2(x - m) over the keys that fall on a row.

    Attributes:
        head_dim: H, 64 or 128.
        cache: dtype of keys and values.
        interpret: take plain jax operations, for the interpreter.
    """

    head_dim: int
    cache: Any
    interpret: bool

    @property
    def numbers(self) -> type[Int8 | E4m3]:
        """How the cache's bytes become float16."""
        return Int8 if self.cache == jnp.int8 else E4m3

    @property
    def unit(self) -> float:
        """What the kernel's products of keys, and of values, are to be multiplied by."""
        return 1.0 if self.interpret else self.numbers.UNIT

    def start(self) -> State:
        """Nothing seen."""
        values = (4 * self.head_dim, 0.0), (KEYS, NOTHING_YET), (KEYS, 0.0)
        acc, m, l = (
            plgpu.layout_cast(jnp.full((rows, HEADS), value, jnp.float32), LAYOUT) for rows, value in values
        )
        return acc, m, l

    def queries(self, q_ref: Any, n: jax.Array) -> jax.Array:
        """The n-th set of queries of `arranged`, in registers."""
        if self.interpret:
            return q_ref[n]
        words = self.head_dim // 8

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT(())),
            return_type=plgpu.ShapeDtypeStruct((KEYS, 2 * words), jnp.dtype(jnp.int32), layout=LAYOUT),
        )
        def load(_: Any, ref: Any, n: Any) -> Any:
            lane = threads.in_block() & 31
            start = Memory(ref).at((Int(n.registers.item()) << 5 | lane) * words)
            found = [x for at in range(0, words, 4) for x in bytes_.read_global(start, 4 * at)]
            return _array(pairs([x.value for x in found]), (KEYS, 2 * words), signed=True)

        return load(q_ref, n)

    def step(
        self, state: State, queries: jax.Array, k: Any, v: Any, scale: jax.Array, factor: jax.Array,
        bias: jax.Array | None,
    ) -> State:  # fmt: skip
        """Adds one tile.

        Args:
            queries: as `queries` gives them.
            k, v: shared memory [keys, H], as `tiled` lays it out.
            scale: float32[keys], what q . k of a key is multiplied by to be a base-2 exponent.
            factor: float32[keys], of the values.
            bias: float32[keys] to add to every exponent, -inf for an invisible key; None for 0.
        """
        if self.interpret:
            return self._interpreted(state, queries, k[...], v[...], scale, factor, bias)
        tile = plgpu.RefType(tiled(1, self.head_dim))
        biases = () if bias is None else (bias,)
        acc, m, l = state

        @plgpu.inline_mgpu(
            arg_types=(LAYOUT, LAYOUT, LAYOUT, LAYOUT, tile, tile, ROW, ROW, (ROW,) * len(biases)),
            return_type=tuple(plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=LAYOUT) for x in state),
        )
        def run(
            _: Any, acc: Any, m: Any, l: Any, q: Any, k: Any, v: Any, scale: Any, factor: Any, biases: Any
        ) -> Any:
            sums = [x for pair in acc.registers.flat for x in elements(pair)]
            m0, l_pairs = elements(m.registers.flat[0]), [elements(x) for x in l.registers.flat]
            q_words = [Int(x) for pair in q.registers.flat for x in elements(pair)]
            per_key = [[elements(x)[0] for x in array.registers.flat] for array in (scale, factor, *biases)]
            s = self._scores(k, q_words)
            values = self._read_values(v)
            weights, m0, l_pairs, sums = _softmax(s, m0, l_pairs, sums, *per_key)
            sums = self._weigh(values, weights, sums)
            return (
                _array(pairs(sums), acc.shape),
                _array(pairs([*m0, *m0]), m.shape),
                _array(pairs([*l_pairs[0], *l_pairs[1]]), l.shape),
            )

        return run(acc, m, l, queries, k, v, scale, factor, biases)

    def _scores(self, k: Any, queries: list[Int]) -> list[list[Any]]:
        """S of this lane: for each 16 keys of this worker, heads 2 q and 2 q + 1 of keys g and g + 8."""
        w, g, q = _place()
        row_bytes, chunks = self.head_dim, self.head_dim // 64
        row = _address(k) + (w * 16 + g) * row_bytes
        at = [row + ((q * chunks + n) ^ self._swizzle(g)) * 16 for n in range(chunks)]
        zero = threads.f32(0.0)
        found = []
        for first in range(0, _rows(k), KEYS):
            words = [
                [x for address in at for x in bytes_.read(address, (first + half) * row_bytes, 4)]
                for half in (0, 8)
            ]
            s = [[zero] * 4, [zero] * 4]  # two sums, so that products do not wait for each other
            for n, (upper, lower) in enumerate(zip(*words, strict=True)):
                evens, odds = zip(*(self.numbers.within(x) for x in (upper, lower)), strict=True)
                a = [*evens, *odds]
                s[n % 2] = bytes_.mma(a, queries[2 * n : 2 * n + 2], s[n % 2])
            found.append([arith.addf(x, y) for x, y in zip(*s, strict=True)])
        return found

    def _read_values(self, v: Any) -> list[list[list[Int]]]:
        """For each 16 keys of this worker and each of keys 2 q, 2 q + 1, 2 q + 8, 2 q + 9, the words of channels g H / 8 on."""
        w, g, q = _place()
        row_bytes, words = self.head_dim, self.head_dim // 32
        at = []
        for row in (q * 2, q * 2 + 1):
            chunk = ((g if words == 4 else g >> 1) ^ self._swizzle(row)) * 16
            start = _address(v) + (w * 16 + row) * row_bytes + chunk
            at.append(start if words == 4 else start + (g & 1) * 8)
        return [
            [bytes_.read(address, (first + half) * row_bytes, words) for half in (0, 8) for address in at]
            for first in range(0, _rows(v), KEYS)
        ]

    def _swizzle(self, row: Int) -> Int:
        """What the 16-byte pieces of a row, one of the first 8, are permuted by."""
        return row if self.head_dim == 128 else row >> 1

    def _weigh(self, values: list[list[list[Int]]], weights: list[list[Any]], sums: list[Any]) -> list[Any]:
        """sums + V^T P^T."""
        sums = list(sums)
        for rows, (upper, lower) in zip(values, weights, strict=True):
            b = [bytes_.transpose(bytes_.pack(*pair)) for pair in (upper, lower)]
            for n, words in enumerate(zip(*rows, strict=True)):  # four channels: two products
                near, far = self.numbers.across(*words[:2]), self.numbers.across(*words[2:])
                for half in range(2):
                    c, i = slice(2 * half, 2 * half + 2), 4 * (2 * n + half)
                    sums[i : i + 4] = bytes_.mma([*near[c], *far[c]], b, sums[i : i + 4])
        return sums

    def _interpreted(
        self, state: State, q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, factor: jax.Array,
        bias: jax.Array | None,
    ) -> State:  # fmt: skip
        acc, m, l = state
        s = jnp.dot(k.astype(jnp.float32), q.astype(jnp.float32).T) * scale[:, None]
        if bias is not None:
            s = s + bias[:, None]
        factor = jnp.maximum(factor, LEAST_FACTOR)
        s_CWRN = s.reshape(-1, WORKERS, 16, HEADS)
        f_CWR1 = factor.reshape(-1, WORKERS, 16, 1)
        m_WN = m.reshape(WORKERS, 16, HEADS)[:, 0]
        top_WN = (s_CWRN + jnp.log2(f_CWR1)).max(axis=(0, 2)) - HEADROOM
        new_WN = jnp.maximum(m_WN, top_WN)
        alpha_W1N = jnp.exp2(m_WN - new_WN)[:, None]
        p_CWRN = jnp.exp2(s_CWRN - new_WN[:, None])
        l = (l.reshape(WORKERS, 16, HEADS) * alpha_W1N + p_CWRN.sum(0)).reshape(l.shape)
        m = jnp.broadcast_to(new_WN[:, None], (WORKERS, 16, HEADS)).reshape(m.shape)
        weights_CWRN = (p_CWRN * f_CWR1).astype(jnp.float16).astype(jnp.float32)
        v_CWRH = v.astype(jnp.float32).reshape(-1, WORKERS, 16, self.head_dim)
        o_WHN = jnp.einsum("CWRN,CWRH->WHN", weights_CWRN, v_CWRH)
        o = o_WHN.reshape(WORKERS, 8, -1, 2, HEADS).transpose(2, 0, 3, 1, 4)  # [i, w, h, g, head]
        acc = acc.reshape(o.shape) * alpha_W1N[None, :, :, None] + o
        return acc.reshape(4 * self.head_dim, HEADS), m, l

    def finish(self, state: State, out: Any, lse: Any, meeting: Any) -> None:
        """Merges the workers; all of them take part.

        Args:
            out: shared memory float32 [H / 8, 64], gets the attention, normalised; entry [c, HEADS g + n] that of channel
                g H / 8 + c and head n. 0 where no key was seen.
            lse: shared memory float32[LSE_ROW], gets the log-sum-exp, natural, of every head in its first HEADS entries.
            meeting: shared memory float32[2 * WORKERS * HEADS], to use.
        """
        acc, m, l = state
        if self.interpret:
            m_WN, l_WN = m.reshape(WORKERS, 16, HEADS)[:, 0], l.reshape(WORKERS, 16, HEADS).sum(1)
            top_N = m_WN.max(0)
            total_N = (l_WN * jnp.exp2(m_WN - top_N)).sum(0)
            share_WN = jnp.where(total_N > 0, jnp.exp2(m_WN - top_N) / total_N, 0.0)
            o = acc.reshape(-1, WORKERS, 2, 8, HEADS) * share_WN[:, None, None]
            out[...] = o.sum(1).reshape(self.head_dim // 8, 64)
            natural_N = (top_N + jnp.log2(total_N)) * _LN2
            lse[...] = jnp.pad(natural_N, (0, LSE_ROW - HEADS))
            return
        merge = plgpu.inline_mgpu(arg_types=(LAYOUT,) * 3 + (plgpu.RefType(),) * 3)(_merge)
        merge(acc, m, l, out, lse, meeting)


_LN2 = 0.6931471805599453


def arranged(q: jax.Array, interpret: bool) -> jax.Array:
    """float32 queries [n, HEADS, H], whose products with bytes float16 may hold, as the workers read them.

    Lane 4 g + q holds, of head g, channels q H / 4 on: 0 and 2, 1 and 3, 4 and 6, and so on, two float16 a word.
    """
    q = q.astype(jnp.float16)
    if interpret:
        return q
    n, _, H = q.shape
    # Channels of a group of four as [pair, even or odd] become [even or odd, pair].
    words = lax.bitcast_convert_type(q.reshape(n, HEADS, 4, H // 16, 2, 2).swapaxes(-1, -2), jnp.int32)
    return words.reshape(-1)


def _softmax(
    s: list[list[Any]], m: list[Any], l: list[list[Any]], sums: list[Any], scale: list[Any], factor: list[Any],
    bias: list[Any] | None = None,
) -> tuple[list[list[list[Any]]], list[Any], list[list[Any]], list[Any]]:  # fmt: skip
    """(weights, m, l, sums) of products S, all of this lane; weights as [16 keys][key g or g + 8][head 2 q or 2 q + 1]."""
    f32 = ir.F32Type.get()
    keys = range(len(scale))
    products = [s[n // 2][2 * (n % 2) : 2 * (n % 2) + 2] for n in keys]  # of key n: two heads
    factor = [arith.maximumf(x, threads.f32(LEAST_FACTOR)) for x in factor]

    def exponents(m: list[Any]) -> list[list[Any]]:
        """Of every key and head, less m."""
        offsets = [[arith.subf(bias[n], x) if bias else arith.negf(x) for x in m] for n in keys]
        return [
            [math.fma(x, scale[n], offset) for x, offset in zip(products[n], offsets[n], strict=True)]
            for n in keys
        ]

    def weighed(m: list[Any]) -> list[list[Any]]:
        p = [[bytes_.exp2(x) for x in row] for row in exponents(m)]
        weights = [[arith.mulf(x, factor[n]) for x in row] for n, row in enumerate(p)]
        return [x for row in (*p, *weights) for x in row]

    straight = weighed(m)
    most = functools.reduce(arith.maxnumf, straight[len(straight) // 2 :])
    over = arith.cmpf(arith.CmpFPredicate.UGT, most, threads.f32(LARGEST))
    every = Int(0xFFFFFFFF).value
    carried = [*straight, *m, *l[0], *l[1], *sums]
    branch = scf.IfOp(nvvm.vote_sync(every, over, "any"), [f32] * len(carried), has_else=True)  # type: ignore[call-arg]
    with ir.InsertionPoint(branch.then_block):
        zero = threads.f32(0.0)
        logs = [bytes_.log2(x) for x in factor]
        tops = [[arith.addf(x, logs[n]) for x in row] for n, row in enumerate(exponents([zero, zero]))]
        raised = []
        for head, old in enumerate(m):
            top = functools.reduce(arith.maximumf, [row[head] for row in tops])
            for distance in (4, 8, 16):
                top = arith.maximumf(top, utils.shfl_bfly(top, distance))
            raised.append(arith.maximumf(old, arith.subf(top, threads.f32(HEADROOM))))
        alpha = [bytes_.exp2(arith.subf(old, new)) for old, new in zip(m, raised, strict=True)]
        shrunk = [arith.mulf(x, alpha[n % 2]) for n, x in enumerate([*l[0], *l[1], *sums])]
        scf.yield_([*weighed(raised), *raised, *shrunk])
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(carried)
    found = list(branch.results)
    p, weights = (
        [found[2 * n : 2 * n + 2] for n in range(first, first + len(scale))] for first in (0, len(scale))
    )
    found = found[4 * len(scale) :]
    m, l_pairs, sums = found[:2], [found[2:4], found[4:6]], found[6:]
    for n, row in enumerate(p):
        l_pairs[n % 2] = [arith.addf(x, y) for x, y in zip(l_pairs[n % 2], row, strict=True)]
    return [weights[n : n + 2] for n in range(0, len(weights), 2)], m, l_pairs, sums


def _merge(_: Any, acc: Any, m: Any, l: Any, out: Any, lse: Any, meeting: Any) -> None:
    """`Workers.finish` on the device."""
    w, g, q = _place()
    lane = threads.in_block() & 31
    meeting, out, lse = Memory(meeting), Memory(out), Memory(lse)
    own = elements(m.registers.flat[0])
    sums = [arith.addf(*pair) for pair in zip(*(elements(x) for x in l.registers.flat), strict=True)]
    for distance in (4, 8, 16):
        sums = [arith.addf(x, utils.shfl_bfly(x, distance)) for x in sums]
    column = q * 2
    with utils.when(g.equals(0)):
        for first, pair in ((0, own), (WORKERS * HEADS, sums)):
            meeting.store(pairs(pair)[0], w * HEADS + column, first)
    utils.warpgroup_barrier()
    shares, naturals = [], []
    for head in range(2):
        ms, ls = (
            [meeting.load(column, first + worker * HEADS + head) for worker in range(WORKERS)]
            for first in (0, WORKERS * HEADS)
        )
        top = functools.reduce(arith.maximumf, ms)
        total = threads.total(
            [arith.mulf(x, bytes_.exp2(arith.subf(y, top))) for x, y in zip(ls, ms, strict=True)]
        )
        share = arith.divf(bytes_.exp2(arith.subf(own[head], top)), total)
        some = arith.cmpf(arith.CmpFPredicate.OGT, total, threads.f32(0.0))
        shares.append(arith.select(some, share, threads.f32(0.0)))
        naturals.append(arith.mulf(arith.addf(top, bytes_.log2(total)), threads.f32(_LN2)))
    with utils.when((threads.in_block() & 127) < 4):  # g = 0 of the first worker
        lse.store(pairs(naturals)[0], column)
    for turn in range(WORKERS):
        with utils.when(w.equals(turn)):
            for n, register in enumerate(acc.registers.flat):
                values = [arith.mulf(x, y) for x, y in zip(elements(register), shares, strict=True)]
                at = lane * 2
                if turn:
                    before = [out.load(at, 64 * n + head) for head in range(2)]
                    values = [arith.addf(x, y) for x, y in zip(values, before, strict=True)]
                out.store(pairs(values)[0], at, 64 * n)
        utils.warpgroup_barrier()


def _place() -> tuple[Int, Int, Int]:
    """(worker w, g, q) of this thread, lane 4 g + q."""
    thread = threads.in_block()
    return (thread >> 5) & 3, (thread >> 2) & 7, thread & 3


def _address(ref: Any) -> Int:
    return Int(llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref)))


def _rows(ref: Any) -> int:
    """Of a tile, which is laid out as [rows / 8, 1, 8, columns]."""
    return ir.MemRefType(ref.type).shape[0] * 8


def _array(registers: list[Any], shape: tuple[int, ...], signed: bool | None = None) -> Any:
    """An array in the layout of wgmma accumulators of its registers, in which rows come before columns."""
    layout = LAYOUT.to_mgpu()
    shaped = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=shaped, _layout=layout, _is_signed=signed)
