"""Linear layers, with weights in the model's dtype or in 8 bits.

An 8-bit matrix is W[out, in] = scale[out] * number[out, in]: the scale is float32, one for each output, so it leaves the sum
over `in` and multiplies its result; what the product reads from memory has 8 bits. Every int8 and float8_e4m3fn is a bfloat16
and a float16 too, so the only error is the rounding of the weights: |W - scale * number| <= scale / 2 for int8, and for e4m3
|W| / 16, or scale / 1024 where that is more; scale = max over `in` of |W|, over 127 or 448.

With `fp8_products` activations are rounded too: e4m3 numbers and one float32 factor for each token, and products multiply 8-bit
numbers (twice the rate of bfloat16 on Hopper), summed in float32. Few rows, as in decode, are bound by reading
the weights and keep their activations as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qwen_jax.errors import QwenJaxError

WEIGHT_DTYPES = {"int8": np.dtype(jnp.int8), "fp8": np.dtype(jnp.float8_e4m3fn)}
MIN_FP8_ROWS = 128  # the smallest prefill piece
# Products are cuBLAS's on NVIDIA GPUs; other compilers pass over it. XLA's own, in Triton, are not faster, take long to compile
# (fp8: 25 s) and read a layer of few rows from a copy out of the stack.
IN_CUBLAS = {"xla_gpu_enable_triton_gemm": False}


def einsum(spec: str, *operands: jax.Array, out: jnp.dtype | None = None) -> jax.Array:
    """Matrix product in `out`, by default the first operand's dtype; float32 stays float32 on every device.

    Products of bf16 accumulate in float32 inside the unit and round once. Asking for a float32 result and casting it gives the
    same bits, but its backward pass multiplies in float32 (measured: half the speed forward on a CPU, too).
    """
    return jnp.einsum(
        spec, *operands, precision=lax.Precision.HIGHEST, preferred_element_type=out or operands[0].dtype
    )


def check_weight_dtype(weight_dtype: str | None, matmul: str | None) -> np.dtype | None:
    """The dtype of the numbers of 8-bit weights; None: weights are in the model's dtype.

    Raises:
        QwenJaxError: a name that is not known, or fp8 products of other weights.
    """
    if matmul not in (None, "fp8"):
        raise QwenJaxError(
            f"matmul={matmul!r} is not known: there is fp8; leave it out for products in the model's dtype"
        )
    if matmul and weight_dtype not in (None, "fp8"):
        raise QwenJaxError(
            f"matmul='fp8' multiplies fp8 weights, weight_dtype={weight_dtype!r} are not: leave one of the two out"
        )
    name = matmul or weight_dtype
    if name is None:
        return None
    if name not in WEIGHT_DTYPES:
        raise QwenJaxError(
            f"weight_dtype={weight_dtype!r} is not one of {', '.join(WEIGHT_DTYPES)}; dtype= takes bfloat16, float16, float32"
        )
    return WEIGHT_DTYPES[name]


def quantise(x: jax.Array, dtype: np.dtype, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """x as (8-bit numbers of its shape, float32 scales without `axes`), x ~ numbers * scales: the largest magnitude along the
    axes fills the range of `dtype`, int8 or float8_e4m3fn. Where all are zero so is the scale."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    limit = float(jnp.finfo(dtype).max if floating else jnp.iinfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True) / limit
    # The scale of subnormal numbers is itself rounded so much that the quotient may leave the range, which e4m3 takes for NaN.
    scaled = jnp.clip(x / jnp.where(scale > 0, scale, 1.0), -limit, limit)
    return (scaled if floating else jnp.round(scaled)).astype(dtype), jnp.squeeze(scale, tuple(axes))


class Linear(nnx.Module):
    """Weight [*out, *in] and optional bias [*out]; the einsum string at the call says which axes are which.

    Attributes:
        weight: in the model's dtype, or 8-bit numbers; then scale is float32[*out], else None.
        bias: in the model's dtype, or None.
        fp8_products: whether calls of many rows round their input to 8 bits as well.
    """

    def __init__(
        self,
        out: tuple[int, ...],
        into: tuple[int, ...],
        *,
        bias: bool = False,
        dtype: jnp.dtype,
        weight_dtype: np.dtype | None = None,
        fp8_products: bool = False,
        rngs: nnx.Rngs,
    ):
        weight = 0.02 * jax.random.normal(rngs.params(), (*out, *into), dtype)
        scale = None
        if weight_dtype is not None:
            weight, scale = quantise(weight, weight_dtype, range(len(out), weight.ndim))
        self.weight = nnx.Param(weight)
        self.scale = None if scale is None else nnx.Param(scale)
        self.bias = nnx.Param(jnp.zeros(out, dtype)) if bias else None
        self.fp8_products = fp8_products

    def __call__(self, x: jax.Array, spec: str) -> jax.Array:
        """[B, T, *out] from x [B, T, *in]."""
        if self.scale is None:
            y = einsum(spec, x, self.weight[...])
            return y if self.bias is None else y + self.bias[...]
        numbers, scale = self.weight[...], self.scale[...]
        rows = math.prod(x.shape[:2])
        # One row is a sum that XLA fuses with what comes before it, in the dtype it finds: bfloat16 would round each product.
        exact = x.astype(jnp.float32) if rows == 1 else x
        # A sum of products with numbers up to 448 leaves the range of float16, never that of bfloat16.
        narrow = rows >= MIN_FP8_ROWS and x.dtype != jnp.float16
        raw = x.dtype if narrow else jnp.dtype(jnp.float32)
        if self.fp8_products and rows >= MIN_FP8_ROWS:
            x8, factor_BT = quantise(x, numbers.dtype, range(2, x.ndim))
            y = jnp.einsum(spec, x8, numbers, preferred_element_type=raw).astype(jnp.float32)
            y = y * jnp.expand_dims(factor_BT, tuple(range(2, y.ndim))) * scale
        else:
            y = einsum(spec, exact, numbers.astype(exact.dtype), out=raw).astype(jnp.float32) * scale
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)
