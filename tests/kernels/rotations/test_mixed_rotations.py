"""Mixed rotations against float64, in plain XLA and by the Hopper kernel under jax's GPU interpreter; what that refuses.

On the GPU itself `scripts/check_gpu.py` compares the two.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels.mixing import queries_matrix
from qwen_jax.kernels.rotations import api, mosaic_gpu, reference


def inputs(B: int, T: int, N: int, H: int, *, shared: bool) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(T)
    q = jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.bfloat16)
    return q, *(
        jnp.asarray(rng.standard_normal((3, 1 if shared else B, T, H // 2)), jnp.float32) for _ in range(2)
    )


def check(got: jax.Array, dtype: Any, q: jax.Array, cos: jax.Array, sin: jax.Array) -> None:
    """Within half a unit in the last place, and what two numbers of this dtype leave of float32."""
    a, b = np.split(np.asarray(q, np.float64), 2, axis=-1)
    cos, sin = (np.asarray(x, np.float64)[..., None, :] for x in (cos, sin))
    want = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1) @ queries_matrix(q.shape[-1])
    assert got.dtype == dtype
    last_place = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0.505 * last_place, atol=1e-3)


@pytest.mark.parametrize(
    ("tile", "shape"), [(4096, (2, 50, 3, 16)), (16, (2, 50, 3, 16)), (64, (1, 128, 1, 80))]
)
@pytest.mark.parametrize(("shared", "dtype"), [(False, jnp.bfloat16), (True, jnp.float16)])
def test_in_xla(
    monkeypatch: pytest.MonkeyPatch, tile: int, shape: tuple[int, int, int, int], shared: bool, dtype: Any
) -> None:
    """All at once, and in tiles the last of which overlaps."""
    monkeypatch.setattr(reference, "TILE", tile)
    arrays = inputs(*shape, shared=shared)
    check(api.mixed_rotations(*arrays, dtype=dtype), dtype, *arrays)


@pytest.mark.parametrize(
    ("shape", "shared", "dtype"),
    [
        ((1, 328, 3, 128), True, jnp.bfloat16),
        ((2, 256, 1, 128), False, jnp.float16),
        ((2, 264, 2, 128), True, jnp.float16),
    ],
)
def test_on_hopper(shape: tuple[int, int, int, int], shared: bool, dtype: Any) -> None:
    """Rows that fill no tile, batches with sines of their own."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("the GPU interpreter of this jax loses track of barriers; the kernel itself runs on it")
    arrays = inputs(*shape, shared=shared)
    got = mosaic_gpu.mixed_rotations(*arrays, dtype=jnp.dtype(dtype), interpret=plgpu.InterpretGPUParams())
    check(got, dtype, *arrays)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "why_not_hopper", lambda: None)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("queries", "heads", "dtype"),
    [(32_768, 28, jnp.bfloat16), (4_096, 40, jnp.float16), (328, 2, jnp.bfloat16)],
)
def test_lowers_for_cuda(queries: int, heads: int, dtype: Any) -> None:
    q = jax.ShapeDtypeStruct((1, queries, heads, 128), jnp.bfloat16)
    sines = [jax.ShapeDtypeStruct((3, 1, queries, 64), jnp.float32)] * 2
    rotated = jax.jit(functools.partial(mosaic_gpu.mixed_rotations, dtype=jnp.dtype(dtype)))
    assert "mosaic_gpu" in rotated.trace(q, *sines).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"T": 248}, "needs 256 queries at least"),
        ({"T": 260}, "a multiple of 8, got 260"),
        ({"H": 64}, "needs a head dimension of 128, got 64"),
        ({"q": jnp.float16}, "needs bfloat16 queries for keys of bfloat16 or float16, got float16, bfloat16"),
        ({"dtype": jnp.float32}, "got bfloat16, float32"),
    ],
)
def test_refuses_what_the_kernel_does_not_serve(change: dict[str, Any], reason: str) -> None:
    made = {"T": 256, "H": 128, "q": jnp.bfloat16, "dtype": jnp.bfloat16} | change
    q, *sines = inputs(1, made["T"], 2, made["H"], shared=True)
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.mixed_rotations(q.astype(made["q"]), *sines, dtype=jnp.dtype(made["dtype"]))


def test_refuses_anything_but_hopper() -> None:
    arrays = inputs(1, 256, 2, 128, shared=True)
    with pytest.raises(NotImplementedError, match=r"runs on NVIDIA GPUs, not on a cpu"):
        api.mixed_rotations(*arrays, dtype=jnp.bfloat16, backend="mosaic_gpu")
