"""Queries in the rotation of every stage, mixed: what prefill makes of a piece before it attends, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_jax.kernels.backends import dispatch, on_gpu
from qwen_jax.kernels.rotations import reference

BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "mosaic_gpu": on_gpu("qwen_jax.kernels.rotations.mosaic_gpu", "mixed_rotations"),
    "xla": reference.mixed_rotations,
}


def mixed_rotations(
    q_BTNH: jax.Array,
    cos_PBTJ: jax.Array,
    sin_PBTJ: jax.Array,
    *,
    dtype: DTypeLike,
    backend: str | None = None,
) -> jax.Array:
    """Rotates queries in float32, for each of P stages, and mixes them (`kernels.mixing.mix`).

    Args:
        q_BTNH: queries, not rotated, [B, T, N, H].
        cos_PBTJ, sin_PBTJ: float32 [P, B or 1, T, H / 2], of the angles of half-split pairs, times what queries are scaled by.
        dtype: that of the keys which they are to meet.
        backend: a name in BACKENDS, or None for the first that accepts.

    Returns:
        [P, B, T, N, H] in `dtype`, rounded once.

    Raises:
        NotImplementedError: the named backend refuses; the message holds the reason.
        ValueError: no backend of that name.
    """
    return dispatch("mixed rotations", BACKENDS, backend, q_BTNH, cos_PBTJ, sin_PBTJ, dtype=jnp.dtype(dtype))
