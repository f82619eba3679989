"""The lists of a piece are the same whichever operations make them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels.sparse_attention.bands import BAND, tile_distances
from qwen_jax.kernels.sparse_attention.lists import ON_GPU, ON_TPU, lists_of


@pytest.mark.parametrize("most", [0, 7, 900])
def test_what_suits_a_gpu_and_a_tpu_gives_the_same(most: int) -> None:
    B, N, S = 2, 3, 33 * BAND + 17
    rng = np.random.default_rng(most)
    columns = np.zeros((B, N, S), bool)
    for head in np.ndindex(B, N):
        columns[(*head, rng.choice(S, min(most, S), replace=False))] = True
    bands = rng.random((B, N, tile_distances(S))) < 0.3
    make = functools.partial(
        lists_of, most_columns=most, last_tile=jnp.int32(30), stage_tiles=(jnp.int32(8), jnp.int32(16)), dca=True
    )  # fmt: skip
    ours, theirs = (
        jax.jit(functools.partial(make, making=making))(columns, bands) for making in (ON_GPU, ON_TPU)
    )
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
