"""16-bit and 8-bit caches through the whole of `LLM`: how far answers move, and that all a cache goes through keeps it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from qwen_jax import LLM, QwenJaxError, SamplingParams, cache, decode, prefill
from qwen_jax.balance import balanced
from qwen_jax.build import build
from qwen_jax.cache import KVCache, abstract_cache, init_cache, keys_dtype
from qwen_jax.decode import BLOCK, Decoding, Request
from qwen_jax.kernels import quantised
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Prefiller
from qwen_jax.sharding import full_mesh, shardings
from tests.tiny_model import CONFIG, random_model

INT8, FP8 = quantised.DTYPES
GREEDY = SamplingParams(max_new_tokens=12, greedy=True, ignore_eos=True)
WIDE = dataclasses.replace(CONFIG, vocab_size=96, num_heads=8, num_kv_heads=8, num_layers=1)
TOKENS = np.random.default_rng(0).integers(1, WIDE.vocab_size, 128)  # four chunks of s = 32
STILL = dataclasses.replace(
    CONFIG,
    num_layers=2,
    dual_chunk=dataclasses.replace(CONFIG.dual_chunk, original_max_position_embeddings=0),
)


def biased_model() -> Qwen2:
    """Keys with biases in a few slow channels that are some 30 times what they are added to, as Qwen2.5's."""
    model = random_model(STILL)
    bias = model.layers.attn.k.bias
    bias[...] = bias[...].at[..., jnp.array([5, 7, 13, 15])].add(25.0)
    return model


def next_token_logits(
    model: Qwen2, dtype: jnp.dtype, decoded: int = 0, mesh: Mesh | None = None
) -> np.ndarray:
    """Logits after TOKENS, the last `decoded` of which go through decode steps; the model's temperature should be off."""
    graph, params = nnx.split(model)
    n = len(TOKENS) - decoded
    cache = init_cache(model.config, 1, 256, dtype, mesh)
    prefiller = Prefiller(graph, params, model.config, 32)
    *_, (_, last_BD, cache) = prefiller.run(TOKENS[None, :n], np.array([n]), cache)
    logits = prefiller.logits(last_BD)
    for at in range(n, len(TOKENS)):
        one = jnp.array([at], jnp.int32)
        logits, cache = _step(graph, params, jnp.asarray(TOKENS[at : at + 1], jnp.int32), cache, one, one)
    return np.asarray(logits[0], np.float64)


_step = jax.jit(lambda graph, params, *args: nnx.merge(graph, params).step(*args), static_argnums=0)


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_balancing_changes_no_bit_of_the_output() -> None:
    model = biased_model()
    other = balanced(model)
    np.testing.assert_array_equal(model(TOKENS[None]), other(TOKENS[None]))
    ratio = np.asarray(other.layers.attn.k.bias[...] / model.layers.attn.k.bias[...])
    assert (np.log2(ratio) == np.round(np.log2(ratio))).all()
    np.testing.assert_array_equal(ratio[..., :8], ratio[..., 8:])  # both channels of a rotation pair
    assert ratio.min() <= 2**-2  # the loud pairs became quieter


def test_balancing_8_bit_weights_changes_no_bit_of_the_output() -> None:
    model = Qwen2(STILL, weight_dtype="int8", rngs=nnx.Rngs(0))
    model.layers.attn.k.bias[...] = model.layers.attn.k.bias[...].at[..., jnp.array([5, 13])].set(9.0)
    other = balanced(model)
    np.testing.assert_array_equal(model(TOKENS[None]), other(TOKENS[None]))
    assert other.layers.attn.k.weight[...] is model.layers.attn.k.weight[...]
    assert other.layers.attn.k.bias[...].max() < 9 / 2


def test_a_balanced_model_keeps_its_dtype_and_the_rest_of_its_arrays() -> None:
    model = random_model(dataclasses.replace(CONFIG, dtype="bfloat16"))
    other = balanced(model)
    assert other.layers.attn.k.weight[...].dtype == jnp.bfloat16
    assert other.layers.mlp.up.weight[...] is model.layers.mlp.up.weight[...]


@pytest.mark.parametrize(("dtype", "most"), [(INT8, 2e-2), (FP8, 8e-2)], ids=["int8", "fp8"])
def test_logits_stay_near_those_of_an_exact_cache(dtype: jnp.dtype, most: float) -> None:
    """Decoded and prefilled alike: both read the same numbers, so they differ less than either does from an exact cache."""
    model = balanced(random_model(STILL))
    exact = next_token_logits(model, jnp.float32)
    prefilled, decoded = (next_token_logits(model, dtype, n) for n in (0, 5))
    assert 1e-4 <= off(prefilled, exact) <= most
    assert off(decoded, prefilled) <= 0.3 * off(prefilled, exact)


@pytest.mark.parametrize(("dtype", "most"), [(jnp.bfloat16, 4e-3), (jnp.float16, 1e-3)], ids=str)
def test_logits_of_16_bit_caches(dtype: jnp.dtype, most: float) -> None:
    model = random_model(STILL)
    exact = next_token_logits(model, jnp.float32)
    for decoded in (0, 5):
        assert 1e-5 <= off(next_token_logits(model, dtype, decoded), exact) <= most


@pytest.mark.parametrize(
    ("device", "dtype", "keys"),
    [
        ("cpu", jnp.bfloat16, jnp.float16),
        ("NVIDIA H200", jnp.bfloat16, jnp.float16),
        ("TPU v5p", jnp.bfloat16, jnp.bfloat16),
        ("TPU v4", jnp.bfloat16, jnp.bfloat16),
        ("NVIDIA H200", jnp.float16, jnp.float16),
        ("NVIDIA H200", jnp.float32, jnp.float32),
        ("NVIDIA H200", INT8, INT8),
    ],
    ids=str,
)
def test_the_dtype_of_keys(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: jnp.dtype, keys: jnp.dtype
) -> None:
    monkeypatch.setattr(cache, "target", lambda: device)
    assert keys_dtype(dtype) == keys


def test_a_document_of_16_bits_is_saved_and_loaded(tmp_path: Path) -> None:
    llm = LLM(random_model(STILL), max_len=512, prefill_chunk=32, kv_dtype="bfloat16")
    document = llm.prefill(TOKENS)
    want = llm.generate(TOKENS[:20], GREEDY, prefix=document)
    document.save(tmp_path / "doc")
    again = llm.load_prefix(tmp_path / "doc")
    assert llm.generate(TOKENS[:20], GREEDY, prefix=again) == want
    for held, read in zip(document.cache, again.cache, strict=True):
        if held is not None:
            np.testing.assert_array_equal(held[..., : len(TOKENS), :], read[..., : len(TOKENS), :])


def test_balancing_saves_int8_from_large_biases() -> None:
    model = biased_model()
    exact = next_token_logits(model, jnp.float32)
    plain, even = (off(next_token_logits(m, INT8), exact) for m in (model, balanced(model)))
    assert plain >= 1.5 * even


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(random_model(STILL), max_len=512, prefill_chunk=32, kv_dtype="int8")


@pytest.mark.parametrize(("name", "dtype"), [("int8", INT8), ("fp8", FP8), ("float8_e4m3fn", FP8)])
def test_the_cache_that_llm_allocates(name: str, dtype: jnp.dtype) -> None:
    cache = LLM(random_model(STILL), max_len=512, kv_dtype=name).new_context().cache
    assert cache.k.dtype == cache.v.dtype == dtype
    assert cache.k_scale is not None
    assert cache.k_scale.shape == cache.k.shape[:-1]


def test_a_document_grows_and_is_saved_and_loaded(llm: LLM, tmp_path: Path) -> None:
    roomy, tight = (llm.prefill(TOKENS, room=room) for room in (300, 1))
    want = llm.generate(TOKENS[:120], GREEDY, prefix=roomy)
    before = tight.cache.capacity
    assert llm.generate(TOKENS[:120], GREEDY, prefix=tight) == want
    assert tight.cache.capacity > before
    roomy.save(tmp_path / "doc")
    assert llm.generate(TOKENS[:120], GREEDY, prefix=llm.load_prefix(tmp_path / "doc")) == want
    (tmp_path / "doc" / "scales.safetensors").unlink()
    with pytest.raises(QwenJaxError, match=r"scales\.safetensors"):
        llm.load_prefix(tmp_path / "doc")


def test_documents_of_another_kind_of_cache_are_refused(llm: LLM, tmp_path: Path) -> None:
    exact = LLM(random_model(STILL), max_len=512)
    document = exact.prefill(TOKENS)
    document.save(tmp_path / "doc")
    with pytest.raises(QwenJaxError, match=r"its cache is float32, this one .*: pass kv_dtype='float32'"):
        llm.load_prefix(tmp_path / "doc")
    with pytest.raises(QwenJaxError, match=r"made with another model|has a cache of float32"):
        llm.generate(TOKENS[:9], GREEDY, prefix=document)
    with pytest.raises(QwenJaxError, match=r"made with another model|has a cache of"):
        exact.generate(TOKENS[:9], GREEDY, prefix=llm.prefill(TOKENS))


@pytest.mark.parametrize(
    ("context", "dtype", "most"), [(1, INT8, 0.3), (2, INT8, 0.3), (2, jnp.bfloat16, 0.7)]
)
def test_eight_devices_give_the_logits_of_one(context: int, dtype: jnp.dtype, most: float) -> None:
    """Apart by less than either is from an exact cache."""
    model = random_model(WIDE)
    devices = np.array(jax.devices()).reshape(1, context, 8 // context)
    mesh = full_mesh(Mesh(devices, ("data", "context", "tensor")))
    where = shardings(WIDE, mesh)
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    eight = balanced(build(WIDE, {path: jax.device_put(x, where[path]) for path, x in leaves.items()}))
    assert eight.layers.attn.k.weight[...].sharding == where["layers.attn.k.weight"]
    for buffer in jax.tree.leaves(init_cache(WIDE, 1, 256, dtype, mesh)):
        assert buffer.sharding.shard_shape(buffer.shape)[2] == context
    alone, together = next_token_logits(balanced(model), dtype, 1), next_token_logits(eight, dtype, 1, mesh)
    exact = next_token_logits(model, jnp.float32, 1)
    assert off(together, alone) <= most * off(alone, exact)


def test_the_cache_is_updated_in_place() -> None:
    """Compiled pieces and decode blocks alias it; beside it a piece keeps one layer in the model's dtype, a block nothing.

    Of int8: XLA's CPU compiler widens arrays of fp8, and so copies the cache.
    """
    config = dataclasses.replace(CONFIG, num_layers=8)
    graph, params = nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0))))
    cache: KVCache = abstract_cache(config, 1, 1 << 17, INT8)
    whole = 2 * (cache.k.size + 4 * cache.k.size // config.head_dim)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    piece = prefill._prefill_piece.lower(
        graph, params, jax.ShapeDtypeStruct((1, 32), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32), one, cache,
        jax.ShapeDtypeStruct((1, config.hidden_size), jnp.float32),
    )  # fmt: skip
    settings = [SamplingParams(greedy=True).resolve()]
    ones = jnp.ones(1, jnp.int32)
    request = Request.of(np.ones(1), np.ones(1), settings)
    state = Decoding(ones, ones, ones, ones == 0, jnp.zeros((1, config.vocab_size), bool))
    block = decode.decode_program(params).lower(graph, params, request, cache, state, jnp.int32(BLOCK))
    layer = 2 * 4 * cache.k.size // config.num_layers
    for program, scratch in ((piece, layer), (block, 0)):
        memory = program.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= whole
        assert memory.temp_size_in_bytes - scratch < whole / config.num_layers / 2
