"""The plan of pieces, and the loop over them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax import prefill
from qwen_jax.cache import KVCache, abstract_cache, init_cache
from qwen_jax.config import DualChunk
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Piece, Prefiller, bucket, default_chunk, plan_pieces
from tests.tiny_model import CONFIG, random_model

S_1M = DualChunk(262_144, 8192).chunk_len


@given(data=st.data())
def test_pieces_cover_every_position_once_and_never_straddle_a_chunk_boundary(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, 3000))
    end = start + data.draw(st.integers(0, 3000))
    capacity = end + data.draw(st.integers(0, 300))
    chunk = data.draw(st.integers(1, 1500))
    s = data.draw(st.none() | st.integers(1, 900))
    pieces = plan_pieces(start, end, chunk=chunk, capacity=capacity, chunk_len=s)
    covered = [i for p in pieces for i in range(p.start, p.start + p.length)]
    assert covered == list(range(start, end))
    for piece in pieces:
        assert 1 <= piece.length <= piece.padded <= chunk
        assert piece.start + piece.padded <= capacity
        if s:
            assert piece.start // s == (piece.start + piece.length - 1) // s


def test_the_1m_models_run_31_full_chunks_and_one_bucket() -> None:
    pieces = plan_pieces(0, 1_010_000, chunk=31_744, capacity=1_010_176, chunk_len=S_1M)
    assert [p.padded for p in pieces] == [31_744] * 31 + [26_112]
    assert all(p.length == 31_744 for p in pieces[:-1])


def test_chunks_that_do_not_divide_s_are_split_at_its_multiples() -> None:
    pieces = plan_pieces(0, 1_010_000, chunk=32_768, capacity=1_010_176, chunk_len=S_1M)
    assert len(pieces) == 32
    assert Piece(229_376, 24_576, 32_768, 229_376) in pieces
    assert Piece(253_952, 32_768, 32_768, 253_952) in pieces


@pytest.mark.parametrize(
    ("dca", "chunk"),
    [
        (None, 32_768),
        (DualChunk(262_144, 8192), 31_744),
        (DualChunk(2048, 256), 1792),
        (DualChunk(32_768, 4096), 28_672),
        (DualChunk(262_144, 262_144 - 253_951), 32_768),  # a prime s
    ],
)
def test_default_chunk(dca: DualChunk | None, chunk: int) -> None:
    assert default_chunk(dataclasses.replace(CONFIG, dual_chunk=dca)) == chunk


def test_short_prompts_do_not_pay_for_a_full_chunk() -> None:
    assert [bucket(n, 31_744) for n in (1, 128, 129, 4096, 4097, 31_000)] == [
        128,
        128,
        256,
        4096,
        8192,
        31_744,
    ]


def test_positions_beyond_the_capacity_are_refused() -> None:
    with pytest.raises(ValueError, match=r"positions 0\.\.11 do not fit a cache of 10"):
        plan_pieces(0, 11, chunk=4, capacity=10)


def run(model: Qwen2, tokens_BT: np.ndarray, chunk: int, capacity: int = 256) -> tuple[np.ndarray, KVCache]:
    """Last logits of each row and the cache, through pieces of `chunk`."""
    prefiller = Prefiller(*nnx.split(model), model.config, chunk)
    lengths_B = np.full(len(tokens_BT), tokens_BT.shape[1])
    cache = init_cache(model.config, len(tokens_BT), capacity, jnp.float32)
    *_, (_, last_BD, cache) = prefiller.run(tokens_BT, lengths_B, cache)
    return np.asarray(prefiller.logits(last_BD)), cache


@pytest.mark.parametrize("chunk", [7, 16, 32, 200])
def test_any_chunking_gives_what_the_whole_gives(chunk: int) -> None:
    model = random_model()
    tokens_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 150))
    whole = np.asarray(model(tokens_BT))[:, -1]
    logits, _ = run(model, tokens_BT, chunk)
    assert np.abs(logits - whole).max() <= 1e-5 * np.abs(whole).max()


def test_the_cache_holds_keys_rotated_at_j_mod_s_and_not_scaled() -> None:
    model = random_model()
    tokens_BT = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (1, 100))
    _, cache = run(model, tokens_BT, 32)
    attn = model.layers.attn
    x_BTD = model.embed(tokens_BT)
    x_BTD = x_BTD / jnp.sqrt(jnp.mean(x_BTD**2, -1, keepdims=True) + CONFIG.rms_norm_eps)
    x_BTD = x_BTD * model.layers.input_norm.weight[0]
    k_BTKH = jnp.einsum("BTD,KHD->BTKH", x_BTD, attn.k.weight[0]) + attn.k.bias[0]
    s, H = CONFIG.dual_chunk.chunk_len, CONFIG.head_dim
    angle_TF = (np.arange(100) % s)[:, None] * CONFIG.rope_theta ** (-np.arange(0, H, 2) / H)
    a, b = np.split(np.asarray(k_BTKH[0], np.float64), 2, axis=-1)
    cos, sin = np.cos(angle_TF)[:, None], np.sin(angle_TF)[:, None]
    want_TKH = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    got_TKH = np.swapaxes(np.asarray(cache.k[0, 0, :, :100]), 0, 1)
    np.testing.assert_allclose(got_TKH, want_TKH, atol=2e-6)


def test_all_full_chunks_run_one_program() -> None:
    model = random_model()
    tokens_BT = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 32 * 7))
    prefill._prefill_piece.clear_cache()  # another test may have compiled the same
    run(model, tokens_BT, 32)
    assert prefill._prefill_piece._cache_size() == 1


def test_the_cache_is_updated_in_place() -> None:
    """The compiled piece aliases the cache and keeps no copy of even one layer of it."""
    config = dataclasses.replace(CONFIG, num_layers=8)
    graph, params = nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0))))
    cache = abstract_cache(config, 1, 1 << 16, jnp.float32)
    piece = prefill._prefill_piece.lower(
        graph,
        params,
        jax.ShapeDtypeStruct((1, 32), jnp.int32),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        cache,
        jax.ShapeDtypeStruct((1, config.hidden_size), jnp.float32),
    )
    memory = piece.compile().memory_analysis()
    whole = 2 * cache.k.size * 4
    assert memory.alias_size_in_bytes >= whole
    assert memory.temp_size_in_bytes < whole / config.num_layers / 4
