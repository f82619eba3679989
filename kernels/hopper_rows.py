"""Operations on the rows of a wgmma accumulator that a warp skips when they would change nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf, vector

LAYOUT = plgpu.Layout.WGMMA
ROW = LAYOUT.reduce(1)  # one value a query row
COLUMN = LAYOUT.reduce(0)  # one value a key
_NEUTRAL = {"multiply": 1.0, "subtract": 0.0}


def change_rows(operation: str, x: jax.Array, row: jax.Array, interpret: bool) -> jax.Array:
    """x * row[:, None] ("multiply") or x - row[:, None] ("subtract"), float32 [64, n] in the accumulator's layout.

    A warp all of whose rows hold the neutral element branches past the work. jax has no branch on a value that differs
    between warps, so this one is written in MLIR; the interpreter takes the plain expression.
    """
    if interpret:
        wide = lax.broadcast_in_dim(row, x.shape, [0])
        return x * wide if operation == "multiply" else x - wide

    @plgpu.inline_mgpu(
        arg_types=(LAYOUT, ROW),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float32), layout=LAYOUT),
    )
    def change(_: Any, x: Any, row: Any) -> Any:
        neutral = mgpu.utils.c(_NEUTRAL[operation], ir.F32Type.get())
        differs = None
        for register in row.registers.flat:
            value = vector.extract(register, dynamic_position=[], static_position=[0])
            is_other = arith.cmpf(arith.CmpFPredicate.UNE, value, neutral)
            differs = is_other if differs is None else arith.ori(differs, is_other)
        every_lane = mgpu.utils.c(0xFFFFFFFF, ir.IntegerType.get_signless(32))
        branch = scf.IfOp(  # type: ignore[call-arg]
            nvvm.vote_sync(every_lane, differs, "any"), [r.type for r in x.registers.flat], has_else=True
        )
        with ir.InsertionPoint(branch.then_block):
            wide = row.broadcast_in_dim(x.shape, (0,), x.layout)
            changed = x * wide if operation == "multiply" else x - wide
            scf.yield_(list(changed.registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(list(x.registers.flat))
        registers = np.array(list(branch.results), dtype=object).reshape(x.registers.shape)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return change(x, row)
