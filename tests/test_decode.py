"""The decode loop: it agrees with prefill wherever temperature is off, and works in place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen_jax import decode
from qwen_jax.cache import abstract_cache, init_cache
from qwen_jax.decode import BLOCK, Decoding, Request
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Prefiller
from qwen_jax.sampling import SamplingParams
from tests.tiny_model import CONFIG, random_model

DCA = CONFIG.dual_chunk
assert DCA is not None
S, C = DCA.chunk_len, DCA.chunk_size
STILL = dataclasses.replace(CONFIG, dual_chunk=dataclasses.replace(DCA, original_max_position_embeddings=0))
_step = jax.jit(
    lambda graph, params, *args: nnx.merge(graph, params).step(*args), static_argnums=0
)  # one program for all lengths


@pytest.mark.parametrize("length", [2, S - 1, S, S + 1, C, C + 1, 2 * S, 2 * S + 1, 3 * S + 5])
def test_decode_and_prefill_agree_at_every_boundary(length: int) -> None:
    """The last of `length` tokens gives the same logits decoded as prefilled, temperature off."""
    model = random_model(STILL)
    graph, params = nnx.split(model)
    tokens_BT = np.random.default_rng(length).integers(0, CONFIG.vocab_size, (1, 3 * S + 5))[:, :length]
    prefiller = Prefiller(graph, params, STILL, 32)
    cache = init_cache(STILL, 1, 256, jnp.float32)
    *_, (_, _, cache) = prefiller.run(tokens_BT[:, :-1], np.array([length - 1]), cache)
    at = jnp.array([length - 1], jnp.int32)
    decoded, _ = _step(graph, params, jnp.asarray(tokens_BT[:, -1]), cache, at, at)
    fresh = init_cache(STILL, 1, 256, jnp.float32)
    *_, (_, last_BD, _) = prefiller.run(tokens_BT, np.array([length]), fresh)
    prefilled = np.asarray(prefiller.logits(last_BD))
    assert np.abs(np.asarray(decoded) - prefilled).max() <= 1e-5 * np.abs(prefilled).max()


def test_a_block_works_in_place() -> None:
    """The compiled loop aliases the cache and keeps no copy of even one layer of it."""
    config = dataclasses.replace(CONFIG, num_layers=8)
    graph, params = nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0))))
    cache = abstract_cache(config, 1, 1 << 17, jnp.float32)
    settings = [SamplingParams(greedy=True).resolve()]
    one = jnp.ones(1, jnp.int32)
    request = Request.of(np.ones(1), np.ones(1), settings)
    state = Decoding(one, one, one, one == 0, jnp.zeros((1, config.vocab_size), bool))
    memory = (
        decode.decode_program(params)
        .lower(graph, params, request, cache, state, jnp.int32(BLOCK))
        .compile()
        .memory_analysis()
    )
    whole = 2 * cache.k.size * 4
    assert memory.alias_size_in_bytes >= whole
    assert memory.temp_size_in_bytes < whole / config.num_layers / 4
