"""The Hopper decode kernel without a Hopper GPU: numerics under jax's GPU interpreter, lowering for cuda, refusals, shares.

On the GPU itself `scripts/check_gpu.py` checks every class of shapes.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.cache import keys_dtype
from qwen_jax.config import DualChunk
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.decode_attention import api, hopper, hopper_quantised, mosaic_gpu, specs, split
from qwen_jax.kernels.decode_attention.split import Problem, Tiling, shares
from qwen_jax.kernels.quantised import quantise
from qwen_jax.rope import Rotary
from tests.kernels.decode_attention.suite import DecodeSuite

_attend = jax.jit(api.decode_attend, static_argnames=("rotary", "backend"))


class Interpreted(DecodeSuite):
    """The suite's check on the interpreter, which takes seconds a call: only the tests below run it."""

    backend = "mosaic_gpu"
    dtype = jnp.bfloat16
    tolerance = 1e-2
    head_dim = 64
    unit = 16


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    """Three blocks, so that a block runs several shares in a row."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("the GPU interpreter of this jax loses track of barriers; the kernel itself runs on it")
    monkeypatch.setitem(
        api.BACKENDS,
        "mosaic_gpu",
        functools.partial(mosaic_gpu.decode_attend, interpret=plgpu.InterpretGPUParams()),
    )
    for module in (hopper, hopper_quantised, split):
        monkeypatch.setattr(module, "multiprocessors", lambda: 3)
    jax.clear_caches()
    return Interpreted()


def test_every_stage_with_temperatures_in_one_batch(interpreted: Interpreted) -> None:
    s = interpreted.s
    interpreted.check(
        [s - 1, 2 * s, 3 * s + 5, -1], [s // 2, 2 * s, 2 * s - 7, 0], interpreted.dca(interpreted.unit)
    )


def test_keys_of_float16(interpreted: Interpreted) -> None:
    interpreted.keys_dtype = jnp.float16
    interpreted.check(
        [2 * interpreted.s + 3, 5], [interpreted.s, 6], interpreted.dca(interpreted.unit), heads=(2, 1)
    )


def test_plain_positions_and_a_group_of_seven(interpreted: Interpreted) -> None:
    interpreted.check([0, 5 * interpreted.unit + 3], [1, 5 * interpreted.unit], None, heads=(7, 1))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("cache", "head_dim", "chunk", "share"),
    [("int8", 128, 128, None), ("float8_e4m3fn", 64, 64, Share(Blocks(64, 2), 1))],
)
def test_an_8_bit_cache_gives_what_its_numbers_say(
    cache: str, head_dim: int, chunk: int, share: Share | None
) -> None:
    """Keys of every stage and of both temperatures, a row that sees nothing, scores that rise, values of every size."""
    rng = np.random.default_rng(0)
    B, S = 2, 320
    q = jnp.asarray(rng.standard_normal((B, 7, head_dim)), jnp.bfloat16)
    k, v = (rng.standard_normal((2, B, 1, S, head_dim)).astype(np.float32) for _ in range(2))
    k[..., 70:80, :] *= 20.0
    v *= np.exp2(rng.integers(-5, 5, S))[:, None]
    v[:, :, :, 5] = 0
    (k8, k_scale), (v8, v_scale) = (quantise(jnp.asarray(x), jnp.dtype(cache)) for x in (k, v))
    call = {
        "layer": 1, "position_B": jnp.array([2 * chunk + 30, -1]), "prompt_len_B": jnp.array([2 * chunk + 9, 0]),
        "rotary": Rotary(1e4, head_dim, 1024, dca=DualChunk(chunk + 32, 32, 100), mixed=True), "scale_B": jnp.full(B, 0.2),
        "share": share, "k_scale_LBKS": k_scale, "v_scale_LBKS": v_scale,
    }  # fmt: skip
    out, lse = _attend(q, k8, v8, **call, backend="mosaic_gpu")
    want, want_lse = _attend(q.astype(jnp.float32), k8, v8, **call, backend="xla")
    assert np.linalg.norm(out[0] - want[0]) <= 1e-2 * np.linalg.norm(want[0])
    assert not out[1].any()
    np.testing.assert_allclose(lse, want_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "cache"),
    [(28, 4, 128, "bfloat16"), (14, 2, 64, "bfloat16"), (40, 8, 128, "int8"), (14, 2, 64, "float8_e4m3fn")],
)
def test_lowers_for_cuda(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, head_dim: int, cache: str
) -> None:
    monkeypatch.setattr(mosaic_gpu, "why_not_hopper", lambda: None)
    rotary = Rotary(1e7, head_dim, 1 << 20, dca=DualChunk(262_144, 8_192, 262_144), mixed=True)
    kv = jax.ShapeDtypeStruct((2, 3, kv_heads, 4096, head_dim), jnp.dtype(cache))
    k = jax.ShapeDtypeStruct(kv.shape, keys_dtype(cache))
    factors = [jax.ShapeDtypeStruct(kv.shape[:4], jnp.float32)] * (2 if kv.dtype.itemsize == 1 else 0)
    q = jax.ShapeDtypeStruct((3, heads, head_dim), jnp.bfloat16)
    row, scale = jax.ShapeDtypeStruct((3,), jnp.int32), jax.ShapeDtypeStruct((3,), jnp.float32)

    def call(
        q: Any, k: Any, v: Any, layer: Any, position: Any, prompt: Any, scale: Any, *factors: Any
    ) -> Any:
        return mosaic_gpu.decode_attend(
            q, k, v, layer=layer, position_B=position, prompt_len_B=prompt, rotary=rotary, scale_B=scale,
            **dict(zip(("k_scale_LBKS", "v_scale_LBKS"), factors, strict=False)),
        )  # fmt: skip

    traced = jax.jit(call).trace(q, k, kv, jax.ShapeDtypeStruct((), jnp.int32), row, row, scale, *factors)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16"),
        ({"head_dim": 80}, "head dimension of 64 or 128"),
        ({"capacity": 100}, "multiple of 8"),
        ({"heads": 65}, "at most 64 query heads"),
        ({"dca": DualChunk(100, 10)}, "multiple of 64"),
        ({"cache": jnp.int8, "heads": 9}, "at most 8 query heads a KV head with a int8 cache"),
        ({"cache": jnp.int8, "scales": False}, "needs scales"),
    ],
)
def test_refuses_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(mosaic_gpu, "why_not_hopper", lambda: None)
    call = {
        "dtype": jnp.bfloat16,
        "head_dim": 64,
        "capacity": 128,
        "heads": 1,
        "dca": None,
        "scales": True,
    } | change
    cache = jnp.zeros((1, 1, 1, call["capacity"], call["head_dim"]), call.get("cache", call["dtype"]))
    scales = jnp.ones(cache.shape[:4]) if "cache" in call and call["scales"] else None
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_gpu.decode_attend(
            jnp.zeros((1, call["heads"], call["head_dim"]), call["dtype"]), cache, cache,
            layer=0, position_B=jnp.zeros(1, jnp.int32), prompt_len_B=jnp.ones(1, jnp.int32),
            rotary=Rotary(1e4, call["head_dim"], 128, dca=call["dca"]), scale_B=jnp.ones(1),
            k_scale_LBKS=scales, v_scale_LBKS=scales,
        )  # fmt: skip


def test_shares_keep_the_blocks_busy_and_never_pass_the_tiles() -> None:
    for batch in (1, 3, 16, 64):
        for capacity in (64, 4096, 1 << 20):
            problem, tiling = Problem(3, batch, 28, 4, capacity, 128), Tiling(64, 5)
            n = shares(problem, tiling)
            assert 1 <= n <= -(-capacity // 64)
            items = batch * 4 * n
            if capacity == 1 << 20:
                assert items / (132 * -(-items // 132)) >= 0.95


def test_the_rule_for_sizes_fits() -> None:
    for head_dim in (64, 128):
        tiling = specs.tiling_for(Problem(3, 1, 28, 4, 4096, head_dim), 253_952, "a device nobody tuned")
        assert 64 * head_dim * (2 + 4) + 4 * head_dim * tiling.stages * tiling.block_kv < 227 * 1024
        problem = Problem(3, 1, 28, 4, 4096, head_dim, cache="int8")
        for chunk in (253_952, 192):
            tiling = specs.tiling_for(problem, chunk, "a device nobody tuned")
            ring = tiling.stages * tiling.block_kv * (2 * head_dim + 8)
            assert chunk % tiling.block_kv == 0
            assert tiling.walks * (ring + 32 * head_dim + 1024) < 227 * 1024


def test_tuned_sizes_are_found_by_device_and_obey_the_chunk() -> None:
    problem = Problem(3, 1, 28, 4, 4096, 128)
    assert specs.tiling_for(problem, 253_952, "NVIDIA H200") == Tiling(block_kv=64, stages=4)
    assert specs.tiling_for(problem, 64, "NVIDIA H200").block_kv == 64


@pytest.mark.usefixtures("interpreted")
def test_a_share_of_the_positions() -> None:
    """The second of two devices: a row with keys of every stage and of both temperatures, and one without a key."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((2, 2, 64)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((1, 2, 1, 256, 64)), jnp.bfloat16) for _ in range(2))
    call = {
        "layer": 0, "position_B": jnp.array([470, 50]), "prompt_len_B": jnp.array([460, 40]), "scale_B": jnp.full(2, 0.2),
        "rotary": Rotary(1e4, 64, 512, dca=DualChunk(272, 16, 100)), "share": Share(Blocks(128, 2), 1),
    }  # fmt: skip
    out, lse = _attend(q, k, v, **call, backend="mosaic_gpu")
    want, want_lse = _attend(q.astype(jnp.float32), k, v, **call, backend="xla")
    assert np.linalg.norm(out - want) <= 1e-2 * np.linalg.norm(want)
    assert not out[1].any()
    np.testing.assert_allclose(lse, want_lse, atol=2e-2)
