"""The Hopper kernels without a Hopper GPU: numerics under jax's GPU interpreter, lowering for cuda, refusals.

On the GPU itself `scripts/check_gpu.py` checks every class of shapes, and the sums of `hopper_sums` that the interpreter
replaces by jax's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.line_scores import api, hopper, mosaic_gpu, reference
from qwen_jax.kernels.line_scores.hopper import Problem
from qwen_jax.kernels.line_scores.hopper_sums import LANE_FLOATS, WARP_FLOATS
from qwen_jax.rope import Rotary

QWEN_1M = DualChunk(262_144, 8_192)


@pytest.mark.parametrize(
    ("mixed", "keys"), [(False, jnp.bfloat16), (True, jnp.bfloat16), (True, jnp.float16)], ids=str
)
def test_agrees_with_the_reference_across_every_stage_and_ragged_rows(
    monkeypatch: pytest.MonkeyPatch, mixed: bool, keys: Any
) -> None:
    """Two blocks, so that a block takes several ranges in a row; the last keys end within a tile."""
    if jax.__version_info__ < (0, 12):
        pytest.skip(
            "the GPU interpreter of this jax loses track of barriers; the kernels themselves run on it"
        )
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
    rotary, q_start, H = Rotary(1e4, 64, 1024, dca=DualChunk(160, 32), mixed=mixed), 256, 64  # s = 128
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 80, 2, H)), jnp.bfloat16)
    k = jnp.asarray(rng.standard_normal((1, 2, 1, 344, H)), keys)
    call: dict[str, Any] = {
        "layer": jnp.int32(0), "q_start": jnp.int32(q_start), "end_B": jnp.array([q_start + 75, 100], jnp.int32),
        "rotary": rotary, "scale_B": jnp.full(2, 1.5 * H**-0.5), "last_queries": 60,
    }  # fmt: skip
    got = jax.jit(lambda q, k: mosaic_gpu.attention_sums(q, k, interpret=plgpu.InterpretGPUParams(), **call))(
        q, k
    )
    want = reference.attention_sums(q.astype(jnp.float32), k.astype(jnp.float32), **call)
    for sums, right in zip(got, want, strict=True):
        assert sums.shape == right.shape
        sums, right = np.asarray(sums)[0, :, : q_start + 75], np.asarray(right)[0, :, : q_start + 75]
        np.testing.assert_allclose(sums.sum(-1), 60, rtol=1e-5)  # every query's attention sums to 1
        assert np.linalg.norm(sums - right) < 1e-2 * np.linalg.norm(right)


class _PartsError(Exception):
    """Carries what the first walk found out of a trace."""


@pytest.mark.parametrize(("blocks", "dca", "off"), [(Blocks(128, 2), True, 0), (Blocks(256, 4), False, 75)])
def test_devices_that_hold_shares_agree_with_one(
    blocks: Blocks, dca: bool, off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another: the interpreter runs one device at a time, so the first walks of all meet by hand."""
    if jax.__version_info__ < (0, 12):
        pytest.skip(
            "the GPU interpreter of this jax loses track of barriers; the kernels themselves run on it"
        )
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
    S, H = 3 * blocks.round, 64
    q_start = S - 256 + off
    rotary = Rotary(1e4, H, 4096, dca=DualChunk(blocks.round + 32, 32) if dca else None)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 80, 2, H)), jnp.bfloat16)
    k = jnp.asarray(rng.standard_normal((1, 2, 1, S, H)), jnp.bfloat16)
    call: dict[str, Any] = {
        "layer": jnp.int32(0), "q_start": jnp.int32(q_start), "end_B": jnp.array([q_start + 75, 100], jnp.int32),
        "rotary": rotary, "scale_B": jnp.full(2, 1.5 * H**-0.5), "last_queries": 60, "first": jnp.int32(q_start + 25),
    }  # fmt: skip
    of_parts = mosaic_gpu._log_sum_exp

    def sums(instead: Any, q: Any, k: Any, share: Share) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(mosaic_gpu, "_log_sum_exp", instead)
            return mosaic_gpu.attention_sums(q, k, share=share, interpret=plgpu.InterpretGPUParams(), **call)

    @jax.jit
    def first_walk(q: Any, k: Any, share: Share) -> Any:
        def stop(parts: Any, axis: None) -> None:
            raise _PartsError(parts)

        with pytest.raises(_PartsError) as found:
            sums(stop, q, k, share)
        return found.value.args[0]

    @jax.jit
    def second_walk(q: Any, k: Any, share: Share, parts: Any) -> Any:
        return sums(lambda _, axis: of_parts(parts, axis), q, k, share)

    shares = [Share(blocks, jnp.int32(rank)) for rank in range(blocks.count)]
    held = list(zip(jnp.split(blocks.deal(k, 3), blocks.count, 3), shares, strict=True))
    parts = jnp.concatenate([first_walk(q, k, share) for k, share in held], axis=2)
    columns, diagonals = zip(*(second_walk(q, k, share, parts) for k, share in held), strict=True)
    got = blocks.undeal(jnp.concatenate(columns, -1), 2), sum(diagonals)
    want = reference.attention_sums(q, k, **call)
    for sums_, right in zip(got, want, strict=True):
        assert sums_.shape == right.shape
        sums_, right = np.asarray(sums_)[0, :, : q_start + 75], np.asarray(right)[0, :, : q_start + 75]
        np.testing.assert_allclose(sums_.sum(-1), 50, rtol=1e-5)
        assert np.linalg.norm(sums_ - right) < 1e-2 * np.linalg.norm(right)
    assert not np.asarray(sum(diagonals))[1].any()


def test_ranges_of_keys_meet_over_an_axis_as_on_one_device() -> None:
    """Some devices have no key for a query; no device has one for the last."""
    rng = np.random.default_rng(0)
    parts = jnp.asarray(rng.standard_normal((3, 1, 2, 4, 2, 5)) * 20, jnp.float32)
    parts = parts.at[1].set(-jnp.inf).at[..., -1].set(-jnp.inf)
    met = jax.vmap(lambda x: mosaic_gpu._log_sum_exp(x, "devices"), axis_name="devices")(parts)
    want = np.logaddexp2.reduce(np.asarray(parts, np.float64), axis=(0, 3))
    want[..., -1] = np.inf
    for rank in range(3):
        np.testing.assert_allclose(met[rank], want, rtol=1e-5)
    together = jnp.concatenate(list(parts), axis=2)
    np.testing.assert_allclose(mosaic_gpu._log_sum_exp(together, None), want, rtol=1e-5)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_gpu, "why_not_hopper", lambda: None)


def shapes(
    heads: int, kv_heads: int, head_dim: int, capacity: int, queries: int, dtype: Any
) -> tuple[Any, ...]:
    return (
        jax.ShapeDtypeStruct((1, queries, heads, head_dim), dtype),
        jax.ShapeDtypeStruct((2, 1, kv_heads, capacity, head_dim), dtype),
        *[jax.ShapeDtypeStruct((), jnp.int32)] * 2,
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
    )


def trace(
    arguments: tuple[Any, ...], rotary: Rotary, last_queries: int = 64, blocks: Blocks | None = None
) -> Any:
    def call(q: Any, k: Any, layer: Any, start: Any, end: Any, scale: Any, rank: Any) -> Any:
        return mosaic_gpu.attention_sums(
            q, k, layer=layer, q_start=start, end_B=end, rotary=rotary, scale_B=scale, last_queries=last_queries,
            share=Share(blocks, rank) if blocks else None,
        )  # fmt: skip

    return jax.jit(call).trace(*arguments, jax.ShapeDtypeStruct((), jnp.int32))


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "queries", "dca"), [(28, 4, 128, 512, QWEN_1M), (14, 2, 64, 19, None)]
)
def test_lowers_for_cuda_without_copying_the_cache(
    heads: int, kv_heads: int, head_dim: int, queries: int, dca: DualChunk | None
) -> None:
    arguments = shapes(heads, kv_heads, head_dim, 4096, queries, jnp.bfloat16)
    traced = trace(arguments, Rotary(1e7, head_dim, 1 << 20, dca=dca))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 2
    cache = f"tensor<{2 * kv_heads}x4096x{head_dim}xbf16>"  # the cache enters by a reshape, nothing else makes one
    assert sum(f"-> {cache}" in line for line in text.splitlines() if "custom_call" not in line) == 1


@pytest.mark.usefixtures("on_hopper")
def test_the_14b_at_a_million_tokens_on_two_devices_lowers_for_cuda_without_copying_the_cache() -> None:
    capacity = 1_015_808 // 2
    arguments = shapes(40, 8, 128, capacity, 31_744, jnp.bfloat16)
    traced = trace(arguments, Rotary(1e7, 128, 1 << 20, dca=QWEN_1M), blocks=Blocks(512, 2))
    assert [x.shape for x in jax.tree.leaves(traced.out_info)] == [(1, 40, capacity), (1, 40, 2 * capacity)]
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 2
    cache = f"tensor<16x{capacity}x128xbf16>"
    assert sum(f"-> {cache}" in line for line in text.splitlines() if "custom_call" not in line) == 1


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16"),
        ({"head_dim": 80}, "head dimension of 64 or 128"),
        ({"capacity": 100}, "multiple of 8"),
        ({"heads": 9, "head_dim": 128}, "at most 8 query heads"),
        ({"last_queries": 65}, "at most 64 last queries"),
        ({"dca": DualChunk(128, 64)}, "multiple of 128"),
        ({"blocks": Blocks(64, 2)}, "blocks of whole key tiles of 128, got blocks of 64"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    call = {
        "dtype": jnp.bfloat16,
        "heads": 1,
        "head_dim": 64,
        "capacity": 128,
        "dca": None,
        "last_queries": 64,
        "blocks": None,
    } | change
    arguments = shapes(call["heads"], 1, call["head_dim"], call["capacity"], 8, call["dtype"])
    with pytest.raises(NotImplementedError, match=reason):
        trace(
            arguments,
            Rotary(1e4, call["head_dim"], 128, dca=call["dca"]),
            call["last_queries"],
            call["blocks"],
        )


def test_refuses_on_a_cpu_and_says_so() -> None:
    with pytest.raises(NotImplementedError, match="mosaic_gpu: runs on NVIDIA GPUs, not on a cpu"):
        api.line_scores(
            jnp.zeros((1, 8, 1, 64)), jnp.zeros((1, 1, 1, 8, 64)), layer=0, q_start=0, kv_len_B=jnp.ones(1, jnp.int32),
            rotary=Rotary(1e4, 64, 128), scale_B=jnp.ones(1), backend="mosaic_gpu",
        )  # fmt: skip


def test_ranges_of_keys_keep_nearly_all_blocks_busy() -> None:
    for batch, kv_heads in ((1, 4), (1, 8), (1, 1), (3, 4), (64, 4)):
        items = Problem(1, batch, kv_heads, kv_heads, 1 << 20, 128).shares * batch * kv_heads
        rounds = -(-items // 132)
        assert items / (132 * rounds) >= 0.95


@pytest.mark.parametrize("group", [1, 7, 8])
def test_shared_memory_holds_every_group_that_is_served(group: int) -> None:
    tiling, problem = hopper.Tiling(), Problem(3, 1, group, 1, 4096, 128)
    stages = tiling.stages(problem)
    assert stages >= 2
    queries = 2 * group * 64 * 128
    first = queries + stages * 2 * tiling.first_keys * 128 + tiling.first_wgs * group * 64 * 8
    second = (
        queries + 4 * group * 64 + tiling.second_wgs * (2 * 64 * 128 + 4 * (LANE_FLOATS + 2 * WARP_FLOATS))
    )
    assert max(first, second) + 1024 <= 227 * 1024
