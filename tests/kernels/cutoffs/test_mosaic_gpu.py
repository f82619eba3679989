"""The cutoff kernel without a GPU: lowering, refusals, its digits; `scripts/check_gpu.py` compares its results.

`tests/sparsity/test_selection.py` holds the properties of cutoffs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.kernels.cutoffs import hopper, mosaic_gpu
from qwen_jax.kernels.cutoffs.api import cutoffs
from qwen_jax.kernels.cutoffs.ranks import Heavy


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "why_not_hopper", lambda: None)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("heavy", [None, Heavy(1 << 19, 128)])
def test_lowers_for_cuda(heavy: Heavy | None) -> None:
    scores, count = jax.ShapeDtypeStruct((28, 1 << 20), jnp.float32), jax.ShapeDtypeStruct((2, 28), jnp.int32)
    find = jax.jit(lambda a, b, count: mosaic_gpu.cutoffs((a, b), count, heavy))
    traced = find.trace(scores, scores, count)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("on_hopper")
def test_refuses_rows_of_a_size_that_loads_do_not_divide() -> None:
    with pytest.raises(NotImplementedError, match="multiple of 4 scores, got 6"):
        mosaic_gpu.cutoffs([jnp.zeros((1, 6))], jnp.ones((1, 1), jnp.int32))


def test_refuses_on_a_cpu_and_says_so() -> None:
    with pytest.raises(NotImplementedError, match="mosaic_gpu: runs on NVIDIA GPUs, not on a cpu"):
        cutoffs([jnp.zeros((1, 8))], jnp.ones((1, 1), jnp.int32), backend="mosaic_gpu")


@pytest.mark.parametrize("size", [1, 2, 4, 1000, 1 << 11, (1 << 11) + 1, 1 << 20, 1_010_000, (1 << 31) - 1])
def test_digits_of_a_place_are_those_of_the_histogram_and_leave_no_bit_out(size: int) -> None:
    digits = hopper.place_digits(size)
    assert all(0 < bits <= 11 for _, bits in digits)
    assert [low for low, _ in digits] == [
        sum(bits for _, bits in digits[n + 1 :]) for n in range(len(digits))
    ]
    assert sum(bits for _, bits in digits) >= (size - 1).bit_length()
    assert sum(bits for _, bits in hopper.RANK_DIGITS) == 31
