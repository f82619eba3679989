"""Mixed rotations on NVIDIA Hopper GPUs: what the kernel serves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.kernels.hopper import why_not_hopper
from qwen_jax.kernels.mixing import queries_matrix
from qwen_jax.kernels.rotations import hopper

_FEW = 256  # queries; fewer leave nearly all multiprocessors idle. From where on XLA is slower was not measured below 4,096.


def mixed_rotations(
    q_BTNH: jax.Array, cos_PBTJ: jax.Array, sin_PBTJ: jax.Array, *, dtype: np.dtype, interpret: Any = None
) -> jax.Array:
    """See `kernels.rotations.api.mixed_rotations`.

    Args:
        interpret: parameters of jax's GPU interpreter, to run without a GPU.

    Raises:
        NotImplementedError: not a Hopper GPU, or shapes and dtypes the kernel does not serve.
    """
    if not interpret and (reason := why_not_hopper()):
        raise NotImplementedError(reason)
    B, T, N, H = q_BTNH.shape
    P, rows = cos_PBTJ.shape[:2]
    if q_BTNH.dtype != jnp.bfloat16 or dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"needs bfloat16 queries for keys of bfloat16 or float16, got {q_BTNH.dtype}, {dtype}"
        )
    if H != 128:
        raise NotImplementedError(f"needs a head dimension of 128, got {H}")
    if T < _FEW or T % 8:
        raise NotImplementedError(f"needs {_FEW} queries at least, and a multiple of 8, got {T}")
    problem = hopper.Problem(P, B, T, N, H, rows == 1)
    sines = (x.reshape(-1, T, H // 2) for x in (cos_PBTJ, sin_PBTJ))
    out = hopper.mixed_rotations(problem, dtype, interpret)(
        jnp.asarray(queries_matrix(H), dtype), *sines, q_BTNH
    )
    return out.reshape(P, *q_BTNH.shape)
