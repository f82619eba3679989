"""Where rows of scores are cut so that a given number of the best remain, found without sorting."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from qwen_jax.kernels.backends import Backend, dispatch, on_gpu
from qwen_jax.kernels.cutoffs import reference
from qwen_jax.kernels.cutoffs.ranks import Heavy

BACKENDS: dict[str, Backend] = {
    "mosaic_gpu": on_gpu("qwen_jax.kernels.cutoffs.mosaic_gpu", "cutoffs"),
    "xla": reference.cutoffs,
}


def cutoffs(
    scores_XS: Sequence[jax.Array],
    count_AX: jax.Array,
    heavy: Heavy | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The cut of every row of A arrays: scores of a higher rank are kept, and those of the least rank up to the last place.

    These are the `count` largest of a row, or all of its scores from 0 up if there are fewer; of those that tie, the first.
    With `heavy` they are as few as weigh `count` or more together.

    Args:
        scores_XS: A arrays float32[X, S]: -inf, which is never kept, or from 0 to +inf.
        count_AX: int32[A, X], how many of each row to keep.
        heavy: scores that weigh more than one, static.
        backend: a name in BACKENDS, or None for the first that accepts.

    Returns:
        (least rank that is kept, see `ranks.rank_of`, last place that keeps it), int32[A, X].

    Raises:
        NotImplementedError: the named backend, or every backend, refuses; the message holds the reasons.
        ValueError: no backend of that name.
    """
    return dispatch("cutoffs", BACKENDS, backend, scores_XS, count_AX, heavy)
