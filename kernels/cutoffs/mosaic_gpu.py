"""Cutoffs on NVIDIA Hopper GPUs: what the kernel serves."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from qwen_jax.kernels.cutoffs import hopper
from qwen_jax.kernels.cutoffs.ranks import Heavy
from qwen_jax.kernels.hopper import why_not_hopper


def cutoffs(
    scores_XS: Sequence[jax.Array], count_AX: jax.Array, heavy: Heavy | None = None
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.cutoffs.reference.cutoffs`.

    Raises:
        NotImplementedError: not a Hopper GPU, or rows that the kernel does not serve.
    """
    if reason := why_not_hopper():
        raise NotImplementedError(reason)
    rows, size = scores_XS[0].shape
    if size % hopper.WIDTH:
        raise NotImplementedError(f"needs rows of a multiple of {hopper.WIDTH} scores, got {size}")
    least, last = hopper.cutoffs(len(scores_XS), rows, size, heavy)(count_AX.reshape(-1), *scores_XS)
    return least.reshape(count_AX.shape), last.reshape(count_AX.shape)
