"""8-bit numbers as operands of mma.sync, in the registers of a warp's lanes: bytes of shared memory to pairs of float16.

Both conversions are exact and cost 1.25 to 2 integer operations a number. A pair is a 32-bit register, its first number
in the lower half.
"""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir

from qwen_jax.kernels.hopper_threads import Int


class Int8:
    """Bytes of int8."""

    UNIT = 1.0  # what a number is divided by

    @staticmethod
    def within(word: Int) -> tuple[Int, Int]:
        """Four numbers of a word as the pairs (0, 2) and (1, 3)."""
        biased = word ^ _SIGNS
        return _from_1024(permute(biased, _HIGH_1024, 0x4240)), _from_1024(
            permute(biased, _HIGH_1024, 0x4341)
        )

    @staticmethod
    def across(a: Int, b: Int) -> list[Int]:
        """Four numbers of each of two words as the pairs (a_n, b_n)."""
        a, b = a ^ _SIGNS, b ^ _SIGNS
        pairs = []
        for selector in (0x5140, 0x7362):
            mixed = permute(a, b, selector)
            pairs += [_from_1024(permute(mixed, _HIGH_1024, x)) for x in (0x4140, 0x4342)]
        return pairs


class E4m3:
    """Bytes of float8_e4m3fn without NaN: their exponents become float16's, whose bias is 8 more."""

    UNIT = 2.0**8

    @staticmethod
    def within(word: Int) -> tuple[Int, Int]:
        """As `Int8.within`."""
        return _low(word), _high(word)

    @staticmethod
    def across(a: Int, b: Int) -> list[Int]:
        """As `Int8.across`."""
        pairs = []
        for selector in (0x4501, 0x6723):
            mixed = permute(a, b, selector)
            pairs += [_high(mixed), _low(mixed)]
        return pairs


_SIGNS = 0x80808080 - (1 << 32)
_HALVES_SIGNS = 0x80008000 - (1 << 32)
_HIGH_1024 = 0x64646464  # the upper byte of a float16 from 1024 to 1279, whose lower byte counts ones


def _from_1024(pair: Int) -> Int:
    """1024 + 128 + x as x, twice."""
    return Int(_ptx("sub.rn.f16x2 $0, $1, $2;", pair, Int(0x64806480)))


def _high(word: Int) -> Int:
    """Bytes 1 and 3."""
    return ((word & 0x7F007F00) >> 1) | (word & _HALVES_SIGNS)


def _low(word: Int) -> Int:
    """Bytes 0 and 2."""
    return ((word & 0x007F007F) << 7) | ((word << 8) & _HALVES_SIGNS)


def permute(a: Int, b: Int | int, selector: int) -> Int:
    """Four of the eight bytes of a (0 to 3) and b (4 to 7), one a hexadecimal digit of the selector, lowest first."""
    return Int(_ptx("prmt.b32 $0, $1, $2, $3;", a, b if isinstance(b, Int) else Int(b), Int(selector)))


def read(address: Int, offset: int, words: int) -> list[Int]:
    """2 or 4 consecutive words of shared memory, aligned; not moved past barriers."""
    results = ", ".join(f"${n}" for n in range(words))
    text = f"ld.shared.v{words}.b32 {{{results}}}, [${words}+{offset}];"
    return [Int(x) for x in _ptx(text, address, results=words, moves=False)]


def read_global(pointer: Any, offset: int) -> list[Int]:
    """4 consecutive words of global memory that nobody writes, aligned; offset in bytes."""
    text = f"ld.global.nc.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];"
    return [Int(x) for x in _ptx(text, pointer, results=4)]


def mma(a: list[Int], b: list[Int], c: list[Any]) -> list[Any]:
    """c + A B, float32 [16, 8], of float16 A [16, 16] and B [16, 8]; all lanes of the warp take part."""
    text = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    return list(_ptx(text, *a, *b, *c, results=4, of=ir.F32Type.get(), moves=False))


def pack(first: Any, second: Any) -> Int:
    """Two float32 as a pair of float16."""
    return Int(_ptx("cvt.rn.f16x2.f32 $0, $1, $2;", second, first))


def transpose(pair: Int) -> Int:
    """A matrix of 8 x 8 float16, of which lane 4 g + q holds entries 2 q and 2 q + 1 of row g, transposed."""
    return Int(_ptx("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", pair, moves=False))


def exp2(x: Any) -> Any:
    """2^x, float32."""
    return _ptx("ex2.approx.ftz.f32 $0, $1;", x, of=ir.F32Type.get())


def log2(x: Any) -> Any:
    """float32; -inf of 0."""
    return _ptx("lg2.approx.ftz.f32 $0, $1;", x, of=ir.F32Type.get())


def _ptx(text: str, *operands: Any, results: int = 1, of: Any = None, moves: bool = True) -> Any:
    of = of or ir.IntegerType.get_signless(32)
    values = [x.value if isinstance(x, Int) else x for x in operands]
    return utils.inline_ptx(
        text, *values, result_types=of if results == 1 else [of] * results,
        has_side_effects=not moves, convergent=not moves,
    )  # fmt: skip
