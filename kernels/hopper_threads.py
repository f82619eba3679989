"""Code of single threads, in MLIR, for the few things that jax's arrays of a warpgroup cannot say."""

from __future__ import annotations

from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

_Compare = arith.CmpIPredicate
_EVERY_LANE = 0xFFFFFFFF


class Int:
    """A 32-bit integer of a thread, with the operators of Python; comparisons are signed, shifts to the right fill with 0."""

    def __init__(self, value: Any) -> None:
        self.value = value if isinstance(value, ir.Value) else utils.c(value, ir.IntegerType.get_signless(32))

    def __add__(self, other: Int | int) -> Int:
        return Int(arith.addi(self.value, _value(other)))

    def __sub__(self, other: Int | int) -> Int:
        return Int(arith.subi(self.value, _value(other)))

    def __mul__(self, other: Int | int) -> Int:
        return Int(arith.muli(self.value, _value(other)))

    def __and__(self, other: Int | int) -> Int:
        return Int(arith.andi(self.value, _value(other)))

    def __or__(self, other: Int | int) -> Int:
        return Int(arith.ori(self.value, _value(other)))

    def __xor__(self, other: Int | int) -> Int:
        return Int(arith.xori(self.value, _value(other)))

    def __lshift__(self, other: int) -> Int:
        return Int(arith.shli(self.value, _value(other)))

    def __rshift__(self, other: int) -> Int:
        return Int(arith.shrui(self.value, _value(other)))

    def __lt__(self, other: Int | int) -> Any:
        return arith.cmpi(_Compare.slt, self.value, _value(other))

    def __le__(self, other: Int | int) -> Any:
        return arith.cmpi(_Compare.sle, self.value, _value(other))

    def equals(self, other: Int | int) -> Any:
        """Whether they are equal, a bit."""
        return arith.cmpi(_Compare.eq, self.value, _value(other))

    def of_lane(self, lane: Int) -> Int:
        """The value that another lane of the warp holds; all lanes take part."""
        every, clamp = Int(_EVERY_LANE).value, Int(31).value
        return Int(nvvm.shfl_sync(every, self.value, lane.value, clamp, nvvm.ShflKind.idx))


def _value(x: Int | int) -> Any:
    return (x if isinstance(x, Int) else Int(x)).value


def choose(condition: Any, a: Int | int, b: Int | int) -> Int:
    """a where the condition, a bit, holds, else b."""
    return Int(arith.select(condition, _value(a), _value(b)))


def f32(value: float) -> Any:
    """A constant."""
    return utils.c(value, ir.F32Type.get())


def in_block() -> Int:
    """This thread's index in its block."""
    return Int(utils.thread_idx())


def element(register: Any, n: int) -> Any:
    """Entry n of a register of several values."""
    return vector.extract(register, dynamic_position=[], static_position=[n])


def elements(register: Any) -> list[Any]:
    """The values that one register of a fragmented array holds."""
    return [element(register, n) for n in range(ir.VectorType(register.type).shape[0])]


def pairs(values: list[Any]) -> list[Any]:
    """Consecutive values as registers of two."""
    kind = ir.VectorType.get((2,), values[0].type)
    return [vector.from_elements(kind, values[n : n + 2]) for n in range(0, len(values), 2)]


def total(values: list[Any]) -> Any:
    """The sum of floats, as a tree: sums do not wait for each other."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=False)
        values = [arith.addf(a, b) for a, b in pairs] + values[len(values) // 2 * 2 :]
    return values[0]


def sync_warp() -> None:
    """The warp's stores are seen by its later loads."""
    nvvm.bar_warp_sync(Int(_EVERY_LANE).value)


class Memory:
    """A thread's view of an array of 32-bit numbers without gaps, shared or global."""

    def __init__(self, ref: Any) -> None:
        self.pointer = utils.memref_ptr(ref)
        self._element = ir.MemRefType(ref.type).element_type

    def at(self, index: Int | int, offset: int = 0) -> Any:
        """The pointer to entry index + offset."""
        moved = utils.getelementptr(self.pointer, [_value(index)], self._element)
        return utils.getelementptr(moved, [offset], self._element) if offset else moved

    def load(self, index: Int | int, offset: int = 0) -> Any:
        """Entry index + offset."""
        return llvm.load(self._element, self.at(index, offset))

    def store(self, value: Any, index: Int | int, offset: int = 0) -> None:
        """Stores one value, or a register of two (index + offset even)."""
        llvm.store(value, self.at(index, offset))
