"""Operations on wgmma accumulators that jax has no words for: branches of one warp, sums that stay within a lane."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

from qwen_jax.kernels.hopper import tiled
from qwen_jax.kernels.hopper_threads import elements, pairs

LAYOUT = plgpu.Layout.WGMMA
ROW = LAYOUT.reduce(1)  # one value a query row
COLUMN = LAYOUT.reduce(0)  # one value a key
PARTS = 8  # columns of a row sum in parts: column c adds up the columns c, c + 8, c + 16, ..., which one lane holds
STALE = 8.0  # how far, in base-2 exponents, scores may pass the running maximum before it moves, where it is looked for
HUGE = 2.0**40  # a lane's sum of exponentials beyond which it is looked for


def scores(q: Any, k: Any) -> jax.Array:
    """Issues S = Q K^T: float32 [64, n], to be read only once the product has been waited for.

    Like plgpu.wgmma but for its accumulator, which the product overwrites: there is nothing to fill before.

    Args:
        q: shared memory [64, H], as `tiled` lays it out.
        k: shared memory [n, H], likewise.
    """
    transforms = tiled(jnp.dtype(q.dtype).itemsize, q.shape[1])

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(transforms), plgpu.RefType(transforms)),
        return_type=plgpu.ShapeDtypeStruct((q.shape[0], k.shape[0]), jnp.dtype(jnp.float32), layout=LAYOUT),
    )
    def issue(_: Any, q_ref: Any, k_ref: Any) -> Any:
        empty = mgpu.WGMMAAccumulator.zero(q.shape[0], k.shape[0])
        k_ref = mgpu.memref_transpose(k_ref, (1, 0, 3, 2))
        s = mgpu.wgmma(empty, q_ref, k_ref, swizzle=transforms[1].swizzle).value
        block = ir.InsertionPoint.current.block
        first = next(
            op for op in block.operations if "wgmma.mma_async" in str(op.attributes.get("asm_string"))
        )
        accumulators = k.shape[0] // 2  # registers a lane
        with ir.InsertionPoint(first):  # its operands: the accumulator, A, B, whether to add
            first.operands[accumulators + 2] = mgpu.utils.c(0, ir.IntegerType.get_signless(32))
        nvvm.wgmma_commit_group_sync_aligned()
        return s

    return issue(q, k)


def exponentials(
    s: jax.Array,
    factor: jax.Array | None,
    m: jax.Array,
    limit: jax.Array,
    l: jax.Array,
    operands: tuple[Any, Any] | None,
    bias: jax.Array | None,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """One tile of a running softmax: (p = exp2(factor s - m), m, limit, l, alpha: what the sums so far shrink by).

    Given the operands of S, the maximum is not looked for: it only guards against overflow, and P, O and l have float32's
    exponents. Sums beyond HUGE, which include infinity, make a warp multiply again and raise m. They are rare: m comes
    from the tiles before.

    Args:
        s: float32 [64, n], products of queries and keys, -inf where a key is invisible.
        factor: float32 scalar, positive, that makes them exponents of base 2; None if they are.
        m: [64], close to the maximum of exponents so far; 0 for a row that has seen no key.
        limit: [64], how far an exponent may pass m: STALE; -inf for a row that has seen no key.
        l: [64, PARTS], the sum of p so far, in parts.
        operands: Q and K in shared memory, as of `scores`, if S is their product as it is; else None.
        bias: [n], a number a key to add to its exponents, which may be -inf; None for 0.
        interpret: take plain jax operations, for the interpreter.
    """
    if interpret:
        x = s if factor is None else s * factor
        if bias is not None:
            x = x + lax.broadcast_in_dim(bias, s.shape, [1])
        x = x - lax.broadcast_in_dim(m, s.shape, [0])
        top = x.max(axis=1)
        rise = jnp.where(top > limit, top, 0.0)
        alpha = jnp.exp2(-jnp.maximum(rise, 0.0))
        p = jnp.exp2(x - lax.broadcast_in_dim(rise, s.shape, [0]))
        l = l * lax.broadcast_in_dim(alpha, l.shape, [0]) + p.reshape(s.shape[0], -1, PARTS).sum(axis=1)
        return p, m + rise, jnp.where(top > limit, STALE, limit), l, alpha

    matrix, row = (_like(x, layout) for x, layout in ((s, LAYOUT), (m, ROW)))
    arrays = operands or ()
    biases = () if bias is None else (bias,)
    factors = () if factor is None else (factor,)
    scalar = plgpu.Layout.WG_SPLAT(())
    references = tuple(plgpu.RefType(tiled(jnp.dtype(x.dtype).itemsize, x.shape[1])) for x in arrays)

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT, (scalar,) * len(factors), ROW, ROW, LAYOUT, references, (COLUMN,) * len(biases)),
        return_type=(matrix, row, row, _like(l, LAYOUT), row),
    )
    def update(
        _: Any, s: Any, factors: tuple[Any, ...], m: Any, limit: Any, l: Any,
        refs: tuple[Any, ...], biases: tuple[Any, ...],
    ) -> Any:  # fmt: skip
        def constant(value: float) -> Any:
            return mgpu.FragmentedArray.splat(mgpu.utils.c(value, ir.F32Type.get()), m.shape, m.layout)

        def less_maximum(s: Any) -> Any:
            x = _scaled_less(s, factors[0], m) if factors else s - _wide(m, s)
            for bias in biases:
                x = x + bias.broadcast_in_dim(x.shape, (1,), x.layout)
            return x

        def exact(s: Any) -> list[Any]:
            x = less_maximum(s)
            top = x.reduce("max", axis=1)
            if refs:  # sums that have grown large move m too, lest they be found large in every tile to come
                top = top.max(l.reduce("add", axis=1).log2(approx=True))
            passes = top > limit

            def moved() -> list[Any]:
                rise = passes.select(top, constant(0.0))
                # A row that has seen no key may move down; its sums are 0 and must stay it.
                alpha = (-rise.max(constant(0.0))).exp2(approx=True)
                lower = x - _wide(rise, x)
                return [lower, m + rise, passes.select(constant(STALE), limit), l * _wide(alpha, l), alpha]

            any_passes = functools.reduce(arith.ori, [elements(x)[0] for x in passes.registers.flat])
            lower, *rows, sums, alpha = _if_any(any_passes, moved, [x, m, limit, l, constant(1.0)])
            p = lower.exp2(approx=True)
            return [p, *rows, _add_up(sums, p), alpha]

        if not refs:
            return tuple(exact(s))
        p = less_maximum(s).exp2(approx=True)
        sums = _add_up(l, p)
        most = functools.reduce(
            arith.maximumf, [x for register in sums.registers.flat for x in elements(register)]
        )
        unsafe = arith.cmpf(arith.CmpFPredicate.OGT, most, mgpu.utils.c(HUGE, ir.F32Type.get()))
        for register in (limit < constant(0.0)).registers.flat:
            unsafe = arith.ori(unsafe, elements(register)[0])
        return tuple(
            _if_any(unsafe, lambda: exact(_multiply(refs[0], refs[1], s)), [p, m, limit, sums, constant(1.0)])
        )

    return update(s, factors, m, limit, l, arrays, biases)


def scale_rows(x: jax.Array, factor: jax.Array, interpret: bool) -> jax.Array:
    """x * factor[:, None], float32 [64, n] in the accumulator's layout. A warp all of whose factors are 1 skips the work."""
    if interpret:
        return x * lax.broadcast_in_dim(factor, x.shape, [0])

    @plgpu.inline_mgpu(arg_types=(LAYOUT, ROW), return_type=_like(x, LAYOUT))
    def change(_: Any, x: Any, factor: Any) -> Any:
        one = mgpu.utils.c(1.0, ir.F32Type.get())
        differs = [
            arith.cmpf(arith.CmpFPredicate.UNE, value, one)
            for register in factor.registers.flat
            for value in elements(register)
        ]
        return _if_any(functools.reduce(arith.ori, differs), lambda: [x * _wide(factor, x)], [x])[0]

    return change(x, factor)


def _like(x: jax.Array, layout: Any) -> Any:
    return plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float32), layout=layout)


def _wide(row: Any, x: Any) -> Any:
    return row.broadcast_in_dim(x.shape, (0,), x.layout)


def _array(registers: list[Any], like: Any) -> Any:
    shaped = np.array(registers, dtype=object).reshape(like.registers.shape)
    return mgpu.FragmentedArray(_registers=shaped, _layout=like.layout, _is_signed=None)


def _scaled_less(s: Any, factor: Any, m: Any) -> Any:
    """factor s - m[:, None], one instruction a number."""
    (factor,) = factor.registers.flat
    less = [arith.negf(x) for x in _wide(m, s).registers.flat]
    factors = vector.broadcast(less[0].type, factor)
    registers = zip(s.registers.flat, less, strict=True)
    return _array([llvm.intr_fma(x, factors, y) for x, y in registers], s)


def _add_up(l: Any, p: Any) -> Any:
    """l [64, PARTS] + the sums of p [64, n] in parts: a lane's registers run over rows first, then tiles of PARTS columns."""
    parts = [l.registers, *p.registers.reshape(-1, *l.registers.shape)]
    return _array(
        [functools.reduce(arith.addf, x) for x in zip(*(part.flat for part in parts), strict=True)], l
    )


def _multiply(q_ref: Any, k_ref: Any, like: Any) -> Any:
    """Q K^T once more, by the instructions that one warp may issue on its own."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    kind = str(ir.MemRefType(q_ref.type).element_type)  # bf16 or f16, in PTX as in MLIR

    def c(value: int) -> Any:
        return mgpu.utils.c(value, i32)

    def address(ref: Any) -> Any:
        return llvm.ptrtoint(i32, mgpu.utils.memref_ptr(ref))

    lane, warp = arith.remui(mgpu.utils.thread_idx(), c(32)), mgpu.utils.warp_idx(sync=False)
    warp = arith.remui(warp, c(4))
    # Of 16 rows by 16 columns of Q and 8 rows by 16 columns of K, a lane holds rows lane / 4 (and 8 below) and
    # columns 2 (lane % 4) and the next (and 8 further on). Rows are 128 bytes, their 16-byte pieces permuted by row % 8.
    row = arith.divui(lane, c(4))
    column_bytes = arith.muli(arith.remui(lane, c(4)), c(4))
    row_bytes = arith.muli(row, c(128))
    columns = ir.MemRefType(q_ref.type).shape[1]  # blocks of 64
    block = 1024  # bytes of 8 rows of 64
    q_address = arith.addi(address(q_ref), arith.addi(row_bytes, arith.muli(warp, c(2 * columns * block))))
    k_address = arith.addi(address(k_ref), row_bytes)
    permutation = arith.muli(row, c(16))
    numbers = 2 * like.registers.size

    @mgpu.utils.fori(c(columns), [mgpu.utils.c(0.0, f32)] * numbers)
    def product(n: Any, s: list[Any]) -> list[Any]:
        """Adds the product of 64 columns, 16 at a time."""
        for quarter in range(4):
            at = [
                arith.addi(
                    arith.xori(arith.addi(column_bytes, c(quarter * 32 + half)), permutation),
                    arith.muli(n, c(block)),
                )
                for half in (0, 16)
            ]
            a = [
                llvm.inline_asm(
                    i32, [arith.addi(q_address, x)], f"ld.shared.b32 $0, [$1+{below}];", "=r,r",
                    has_side_effects=True,
                )
                for x in at
                for below in (0, columns * block)
            ]  # fmt: skip
            b = [arith.addi(k_address, x) for x in at]
            for first in range(0, numbers, 4):  # 8 keys each
                offset = first // 4 * columns * block
                result = llvm.inline_asm(
                    llvm.StructType.get_literal([f32] * 4),
                    [*s[first : first + 4], *a, *b],
                    f"""{{
                    .reg .b32 x, y;
                    ld.shared.b32 x, [$12+{offset}];
                    ld.shared.b32 y, [$13+{offset}];
                    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
                        {{$0,$1,$2,$3}}, {{$8,$9,$10,$11}}, {{x,y}}, {{$4,$5,$6,$7}};
                    }}""",
                    "=f,=f,=f,=f,0,1,2,3,r,r,r,r,r,r",
                    has_side_effects=True,
                )
                s[first : first + 4] = [llvm.extractvalue(f32, result, [i]) for i in range(4)]
        return s

    s = product.results
    return _array(pairs(s), like)


def _if_any(condition: Any, then: Callable[[], list[Any]], otherwise: list[Any]) -> list[Any]:
    """The arrays of `then` in a warp one of whose lanes meets the condition, else `otherwise`, which have the same layouts."""
    every_lane = mgpu.utils.c(0xFFFFFFFF, ir.IntegerType.get_signless(32))
    types = [register.type for x in otherwise for register in x.registers.flat]
    branch = scf.IfOp(nvvm.vote_sync(every_lane, condition, "any"), types, has_else=True)  # type: ignore[call-arg]
    with ir.InsertionPoint(branch.then_block):
        scf.yield_([register for x in then() for register in x.registers.flat])
    with ir.InsertionPoint(branch.else_block):
        scf.yield_([register for x in otherwise for register in x.registers.flat])
    results = iter(branch.results)
    return [_array([next(results) for _ in range(x.registers.size)], x) for x in otherwise]
