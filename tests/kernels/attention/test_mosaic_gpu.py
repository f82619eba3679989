"""The Hopper kernel without a Hopper GPU: numerics under jax's GPU interpreter, lowering for cuda, refusals, the work order.

On the GPU itself `scripts/check_gpu.py` checks every class of shapes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels import hopper as chip
from qwen_jax.kernels.attention import api, hopper, mosaic_gpu, specs
from qwen_jax.kernels.attention.hopper import Problem, Tiling
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.rope import Rotary
from tests.kernels.attention.suite import AttentionSuite, Case

QWEN_1M = DualChunk(262_144, 8_192)


class Interpreted(AttentionSuite):
    """The suite's check on the interpreter, which takes seconds a call: only the tests below run it."""

    backend = "mosaic_gpu"
    dtype = jnp.bfloat16
    tolerance = 1e-2
    head_dim = 64
    unit = 16


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    """Two blocks, so that a block runs several items in a row."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("the GPU interpreter of this jax loses track of barriers; the kernel itself runs on it")
    monkeypatch.setitem(
        api.BACKENDS, "mosaic_gpu", functools.partial(mosaic_gpu.attend, interpret=plgpu.InterpretGPUParams())
    )
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
    jax.clear_caches()
    return Interpreted()


def test_rows_of_different_lengths_across_every_stage(interpreted: Interpreted) -> None:
    n, s = interpreted.unit, interpreted.s
    start = 2 * s + n
    interpreted.check(Case(start, 2 * n, (start + 2 * n, s + 5, 0), 4, 2), interpreted.dca)


def test_keys_of_float16(interpreted: Interpreted) -> None:
    interpreted.keys_dtype = jnp.float16
    interpreted.check(Case(2 * interpreted.s, 19, (2 * interpreted.s + 19,), 2, 1), interpreted.dca)


def test_ragged_queries_and_a_group_of_seven(interpreted: Interpreted) -> None:
    interpreted.check(Case(3 * interpreted.s, 19, (3 * interpreted.s + 19,), 7, 1), interpreted.dca)


def test_plain_positions_at_an_offset_off_the_tile(interpreted: Interpreted) -> None:
    interpreted.check(Case(37, 100, (130,), 2, 1), None)


@pytest.mark.usefixtures("interpreted")
def test_scores_that_grow_by_far_more_than_float32_has_exponents() -> None:
    """The component that rotates least carries 3 more base-2 exponents a key; powers of two, so nothing is rounded."""
    head_dim, keys, queries = 64, 256, 64
    q, k, v = (
        jax.random.normal(jax.random.key(n), shape, jnp.bfloat16)
        for n, shape in enumerate(((1, queries, 2, head_dim), *[(1, 1, 1, keys, head_dim)] * 2))
    )
    q = q.at[..., head_dim // 2 - 1].set(16.0)
    k = k.at[..., head_dim // 2 - 1].set(3.0 * jnp.arange(keys) - 500)
    call = functools.partial(
        api.attend, q, k, v, layer=0, q_start=keys - queries, kv_len_B=jnp.array([keys]),
        rotary=Rotary(1e7, head_dim, 1024), scale_B=jnp.full(1, math.log(2) / 16),
    )  # fmt: skip
    (out, lse), (want, want_lse) = call(backend="mosaic_gpu"), call(backend="xla")
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=2e-2)
    error = np.linalg.norm((out - want).astype(np.float32)) / np.linalg.norm(want.astype(np.float32))
    assert error < 1e-2


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "why_not_hopper", lambda: None)


def lower(
    queries: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dca: DualChunk | None,
    tiling: Tiling | None = None,
    keys: Any = jnp.bfloat16,
) -> str:
    rotary = Rotary(1e7, head_dim, 1 << 20, dca=dca, mixed=keys == jnp.float16)
    k, v = (jax.ShapeDtypeStruct((2, 1, kv_heads, 4096, head_dim), x) for x in (keys, jnp.bfloat16))
    q = jax.ShapeDtypeStruct((1, queries, heads, head_dim), jnp.bfloat16)
    scalar, row = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)

    def call(q: Any, k: Any, v: Any, layer: Any, start: Any, length: Any, scale: Any) -> Any:
        return mosaic_gpu.attend(
            q, k, v, layer=layer, q_start=start, kv_len_B=length, rotary=rotary, scale_B=scale, tiling=tiling
        )

    scale = jax.ShapeDtypeStruct((1,), jnp.float32)
    traced = jax.jit(call).trace(q, k, v, scalar, scalar, row, scale)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads", "head_dim", "dca"),
    [(512, 28, 4, 128, QWEN_1M), (333, 40, 8, 128, None), (256, 14, 2, 64, DualChunk(320, 64))],
)
def test_lowers_for_cuda_without_copying_the_cache(
    queries: int, heads: int, kv_heads: int, head_dim: int, dca: DualChunk | None
) -> None:
    text = lower(queries, heads, kv_heads, head_dim, dca)
    assert "mosaic_gpu" in text
    cache = f"tensor<{2 * kv_heads}x4096x{head_dim}xbf16>"  # the cache enters by a reshape, nothing else makes one
    assert sum(f"-> {cache}" in line for line in text.splitlines() if "custom_call" not in line) == 2


@pytest.mark.usefixtures("on_hopper")
def test_lowers_for_cuda_with_keys_of_float16() -> None:
    text = lower(512, 28, 4, 128, QWEN_1M, keys=jnp.float16)
    assert "mosaic_gpu" in text
    assert "tensor<8x4096x128xf16>" in text


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16"),
        ({"head_dim": 80}, "head dimension of 64 or 128"),
        ({"capacity": 100}, "multiple of 8"),
        ({"dca": DualChunk(100, 10)}, "multiple of 64"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    call = {"dtype": jnp.bfloat16, "head_dim": 64, "capacity": 128, "dca": None} | change
    cache = jnp.zeros((1, 1, 1, call["capacity"], call["head_dim"]), call["dtype"])
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.attend(
            jnp.zeros((1, 8, 1, call["head_dim"]), call["dtype"]), cache, cache,
            layer=0, q_start=0, kv_len_B=jnp.ones(1, jnp.int32),
            rotary=Rotary(1e4, call["head_dim"], 128, dca=call["dca"]), scale_B=jnp.ones(1),
        )  # fmt: skip


def test_refuses_on_a_cpu_and_says_so() -> None:
    assert "not on a cpu" in (chip.why_not_hopper() or "")
    with pytest.raises(NotImplementedError, match="mosaic_gpu: runs on NVIDIA GPUs, not on a cpu"):
        api.attend(
            jnp.zeros((1, 8, 1, 64)), *[jnp.zeros((1, 1, 1, 8, 64))] * 2,
            layer=0, q_start=0, kv_len_B=jnp.ones(1, jnp.int32), rotary=Rotary(1e4, 64, 128), scale_B=jnp.ones(1),
            backend="mosaic_gpu",
        )  # fmt: skip


def test_heads_that_run_side_by_side_are_whole_groups_and_divide_all() -> None:
    for capacity in (1024, 32_768, 1 << 20):
        for heads, kv_heads in ((28, 4), (40, 8), (14, 2), (5, 1)):
            together = hopper.heads_together(Problem(1, 1, 128, heads, kv_heads, capacity, 128))
            assert together % (heads // kv_heads) == 0
            assert heads % together == 0


def test_the_rule_for_sizes_gives_tiles_that_divide_the_chunk_and_fit() -> None:
    for head_dim in (64, 128):
        for chunk_len in (None, 64, 192, 1024, 253_952):
            problem = Problem(3 if chunk_len else 1, 1, 128, 28, 4, 4096, head_dim)
            tiling = specs.tiling_for(problem, chunk_len, "a device nobody tuned")
            assert not chunk_len or chunk_len % tiling.block_kv == 0
            shared = 2 * head_dim * (2 * tiling.rows + 2 * tiling.stages * tiling.block_kv)
            assert shared < 227 * 1024


def test_tuned_sizes_are_found_by_device_and_obey_the_chunk() -> None:
    problem = Problem(3, 1, 128, 28, 4, 4096, 128)
    assert specs.tiling_for(problem, 253_952, "NVIDIA H200") == Tiling(
        block_kv=128, stages=2, registers=(232, 40)
    )
    assert specs.tiling_for(problem, 64, "NVIDIA H200").block_kv == 64


@pytest.mark.usefixtures("interpreted")
def test_a_share_of_the_positions() -> None:
    """The second of two devices, over a boundary of dual chunk attention; its last block holds keys that no query sees."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((1, 24, 2, 64)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, 1, 1, 256, 64)), jnp.bfloat16) for _ in range(2))
    call: dict[str, Any] = {
        "layer": 0, "q_start": 450, "kv_len_B": jnp.array([470]), "rotary": Rotary(1e4, 64, 512, dca=DualChunk(272, 16)),
        "scale_B": jnp.full(1, 0.2), "share": Share(Blocks(128, 2), 1),
    }  # fmt: skip
    out, lse = api.attend(q, k, v, **call, backend="mosaic_gpu")
    want, want_lse = api.attend(q.astype(jnp.float32), k, v, **call, backend="xla")
    assert np.linalg.norm(out[:, :20] - want[:, :20]) <= 1e-2 * np.linalg.norm(want[:, :20])
    np.testing.assert_allclose(lse[:, :20], want_lse[:, :20], atol=2e-2)


def test_shares_of_broken_tiles_are_refused(on_hopper: None) -> None:
    q, cache = jnp.zeros((1, 8, 2, 64), jnp.bfloat16), jnp.zeros((1, 1, 1, 128, 64), jnp.bfloat16)
    call: dict[str, Any] = {
        "layer": 0, "q_start": 0, "kv_len_B": jnp.array([8]), "rotary": Rotary(1e4, 64, 512), "scale_B": jnp.ones(1)
    }  # fmt: skip
    with pytest.raises(NotImplementedError, match="in blocks of whole key tiles of 128, got blocks of 64"):
        mosaic_gpu.attend(q, cache, cache, **call, share=Share(Blocks(64, 2), 0))
