"""The TPU decode kernel without a TPU: numerics under jax's TPU interpreter, the TPU's compiler, refusals, bytes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import DualChunk
from qwen_jax.context import capacity_for
from qwen_jax.kernels.blocks import Blocks, Share
from qwen_jax.kernels.decode_attention import api, mosaic_tpu, reference
from qwen_jax.kernels.decode_attention.tpu import Problem
from qwen_jax.kernels.quantised import quantise
from qwen_jax.rope import Rotary
from scripts import tpu_topology
from tests.kernels.decode_attention.suite import DecodeSuite
from tests.kernels.tpu_interpreter import INTERPRETER, races_found

QWEN_1M = DualChunk(262_144, 8_192, 262_144)


class Interpreted(DecodeSuite):
    """The suite's check on the interpreter, which takes seconds a call: only the tests below run it."""

    backend = "mosaic_tpu"
    dtype = jnp.bfloat16
    tolerance = 1e-2
    head_dim = 128
    unit = 32  # s is 128 tokens, and the cache, 528, no multiple of the key tile


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Interpreted]:
    attend = functools.partial(mosaic_tpu.decode_attend, interpret=INTERPRETER, block_kv=128)
    monkeypatch.setitem(api.BACKENDS, "mosaic_tpu", attend)
    jax.clear_caches()
    yield Interpreted()
    assert not races_found()


def test_every_stage_with_temperatures_in_one_batch(interpreted: Interpreted) -> None:
    s = interpreted.s
    interpreted.check(
        [s - 1, 2 * s, 3 * s + 5, -1], [s // 2, 2 * s, 2 * s - 7, 0], interpreted.dca(interpreted.unit)
    )


def test_the_end_of_a_cache_and_keys_shared_by_two_cores(
    interpreted: Interpreted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mosaic_tpu, "generation", lambda kind: "v5p")
    interpreted.check([527, 3], [500, 1], None, heads=(7, 1))


def test_a_head_of_64_is_read_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys lie along lanes: copies then start at multiples of 128, the last tile of the cache, 4224, from further left."""
    narrow = Interpreted()
    narrow.head_dim, narrow.unit = 64, 256
    attend = functools.partial(mosaic_tpu.decode_attend, interpret=INTERPRETER, block_kv=256)
    monkeypatch.setitem(api.BACKENDS, "mosaic_tpu", attend)
    jax.clear_caches()
    narrow.check([4 * narrow.s + 100, 2 * narrow.s, 5], [narrow.s, 2 * narrow.s, 0], narrow.dca(narrow.unit))
    assert not races_found()


@pytest.mark.parametrize(("cache", "share"), [(jnp.int8, None), (jnp.float8_e4m3fn, Share(Blocks(32, 2), 1))])
def test_8_bit_cache_whole_and_dealt_to_two_devices(
    interpreted: Interpreted, cache: Any, share: Share | None
) -> None:
    rng = np.random.default_rng(0)
    (N, K, H), S, positions = (4, 2, 64), 256, [130, 500 if share else 255]
    B = len(positions)
    q = interpreted.random(rng, (B, N, H))
    (k, k_scale), (v, v_scale) = (quantise(interpreted.random(rng, (2, B, K, S, H)), cache) for _ in range(2))
    call = functools.partial(
        jax.jit(lambda q, *x, attend, **kw: attend(q, *x, rotary=rotary, **kw), static_argnames="attend"),
        q, k, v,
        layer=jnp.int32(1), position_B=jnp.array(positions), prompt_len_B=jnp.array([100, 200]),
        scale_B=jnp.full(B, 0.2), k_scale_LBKS=k_scale, v_scale_LBKS=v_scale, **({"share": share} if share else {}),
    )  # fmt: skip
    rotary = Rotary(1e4, H, 4096, dca=DualChunk(320, 64, 64), mixed=True)
    out, lse = call(attend=api.BACKENDS["mosaic_tpu"])
    want, want_lse = call(attend=reference.decode_attend)
    difference = np.asarray(out, np.float32) - np.asarray(want, np.float32)
    assert np.linalg.norm(difference) <= 1e-2 * np.linalg.norm(np.asarray(want, np.float32))
    np.testing.assert_allclose(lse, want_lse, atol=2e-2)


@pytest.mark.skipif(tpu_topology.why_no_compiler() is not None, reason=tpu_topology.why_no_compiler() or "")
@pytest.mark.parametrize(
    ("generation", "heads", "head_dim", "cache"),
    [
        ("v5e", (28, 4), 128, jnp.int8),
        ("v5p", (40, 8), 128, jnp.bfloat16),
        ("v6e", (28, 4), 128, jnp.float8_e4m3fn),
        ("v5e", (14, 2), 64, jnp.bfloat16),
        ("v6e", (14, 2), 64, jnp.int8),
    ],
)
def test_compiles_for_a_tpu_at_a_million_tokens(
    generation: str, heads: tuple[int, int], head_dim: int, cache: Any
) -> None:
    N, K = heads
    S, shape = capacity_for(1_010_000, 1_010_000), jax.ShapeDtypeStruct
    rotary = Rotary(1e7, head_dim, 1 << 20, dca=QWEN_1M, mixed=True)
    kv = shape((2, 1, K, S, head_dim), cache)
    scales = (shape(kv.shape[:4], jnp.float32),) * 2 if jnp.dtype(cache).itemsize == 1 else (None, None)
    row = shape((1,), jnp.int32)

    def call(
        q: Any, k: Any, v: Any, layer: Any, position: Any, prompt: Any, scale: Any, ks: Any, vs: Any
    ) -> Any:
        return api.decode_attend(
            q, k, v, layer=layer, position_B=position, prompt_len_B=prompt, rotary=rotary, scale_B=scale,
            k_scale_LBKS=ks, v_scale_LBKS=vs,
        )  # fmt: skip

    compiled = tpu_topology.compile_for_one(
        tpu_topology.SMALLEST[generation], call, shape((1, N, head_dim), jnp.bfloat16), kv, kv,
        shape((), jnp.int32), row, row, shape((1,), jnp.float32), *scales,
    )  # fmt: skip
    assert "tpu_custom_call" in compiled.as_text()
    layer = 2 * K * S * head_dim * jnp.dtype(cache).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * layer  # no copy of the cache


def test_copies_little_more_than_keys_and_values() -> None:
    S = capacity_for(1_010_000, 1_010_000)
    for heads, kv_heads in ((7, 1), (28, 4), (40, 8)):
        for cache in ("bfloat16", "int8"):
            problem = Problem(3, 1, kv_heads, 16, S, 128, 0, cache, 1)
            tile = mosaic_tpu.tile_for(problem, QWEN_1M.chunk_len)
            token = 2 * kv_heads * 128 * jnp.dtype(cache).itemsize
            copied = -(-1_000_000 // tile) * tile * (token + (8 * kv_heads if problem.quantised else 0))
            copied += 3 * kv_heads * 16 * 128 * 2 + kv_heads * 16 * (128 + 128) * 4  # queries in, parts out
            assert copied / (1_000_000 * token) <= 1.05, (heads, cache)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.float32}, "needs bfloat16"),
        ({"head_dim": 80}, "head dimension of 64 or 128"),
        ({"capacity": 100}, "multiple of 16"),
        ({"capacity": 144, "head_dim": 64}, "multiple of 128"),
        ({"dca": DualChunk(100, 10)}, "multiple of 16"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], reason: str) -> None:
    call = {"dtype": jnp.bfloat16, "head_dim": 128, "capacity": 128, "dca": None} | change
    cache = jnp.zeros((1, 1, 1, call["capacity"], call["head_dim"]), call["dtype"])
    with pytest.raises(NotImplementedError, match=reason):
        mosaic_tpu.decode_attend(
            jnp.zeros((1, 1, call["head_dim"]), call["dtype"]), cache, cache,
            layer=0, position_B=jnp.zeros(1, jnp.int32), prompt_len_B=jnp.ones(1, jnp.int32),
            rotary=Rotary(1e4, call["head_dim"], 128, dca=call["dca"]), scale_B=jnp.ones(1), interpret=True,
        )  # fmt: skip
