"""A model on eight devices, along any axes, gives what it gives on one: prefill, decode, documents, scores."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import load_file

from qwen_jax import LLM, QwenJaxError, SamplingParams, prefill
from qwen_jax.build import build
from qwen_jax.cache import abstract_cache, cache_shardings, init_cache
from qwen_jax.context import Context
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Prefiller
from qwen_jax.sharding import full_mesh, shardings
from tests.compiled import programs_of
from tests.tiny_model import CONFIG, random_model

DCA = CONFIG.dual_chunk
assert DCA is not None
S = DCA.chunk_len
WIDE = dataclasses.replace(CONFIG, vocab_size=96, num_heads=16, num_kv_heads=8, num_layers=2)
CAPACITY = 128
LENGTHS = np.array([3 * S + 5, 2 * S, 7, S + 1])
MESHES = [(1, 4, 2)]
GREEDY = SamplingParams(max_new_tokens=10, greedy=True, ignore_eos=True)
_step = jax.jit(
    lambda graph, params, *args: nnx.merge(graph, params).step(*args), static_argnums=0, donate_argnums=3
)


@functools.cache
def on_mesh(shape: tuple[int, int, int] | None) -> Qwen2:
    """The same model on a mesh of data x context x tensor, or on one device."""
    model = random_model(WIDE)
    if shape is None:
        return model
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    where = shardings(WIDE, full_mesh(Mesh(devices, ("data", "context", "tensor"))))
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    return build(WIDE, {path: jax.device_put(x, where[path]) for path, x in leaves.items()})


@functools.cache
def logits_of(shape: tuple[int, int, int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Of the last token of four ragged prompts, prefilled, and of one token behind each, decoded."""
    model = on_mesh(shape)
    graph, params = nnx.split(model)
    mesh = model.spread.mesh if model.spread else None
    tokens_BT = np.random.default_rng(0).integers(0, WIDE.vocab_size, (len(LENGTHS), LENGTHS.max()))
    prefiller = Prefiller(graph, params, WIDE, S)
    cache = init_cache(WIDE, len(LENGTHS), CAPACITY, jnp.float32, mesh)
    *_, (_, last_BD, cache) = prefiller.run(tokens_BT, LENGTHS, cache)
    position_B = jnp.asarray(LENGTHS, jnp.int32)
    decoded, _ = _step(graph, params, jnp.asarray(tokens_BT[:, 0]), cache, position_B, position_B)
    return np.asarray(prefiller.logits(last_BD)), np.asarray(decoded)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_prefill_and_decode_equal_those_of_one_device(shape: tuple[int, int, int]) -> None:
    """Ragged rows over three boundaries of dual chunk attention."""
    for one, many in zip(logits_of(None), logits_of(shape), strict=True):
        assert np.abs(one - many).max() <= 1e-5 * np.abs(one).max()


def test_a_first_answer_compiles_four_programs(caplog: pytest.LogCaptureFixture) -> None:
    """Small arrays arrive on all devices: else each would be moved by a program of its own."""
    llm = LLM(on_mesh((2, 2, 2)), max_len=256, prefill_chunk=S)
    programs = programs_of(lambda: llm.generate([1, 2, 3], GREEDY), caplog)
    assert programs == ["empty_cache", "_prefill_piece", "first_token", "_decode_block"]


def test_documents_questions_and_scores_equal_those_of_one_device(tmp_path: Path) -> None:
    """Questions begin inside a block, rows are fewer than the axis `data`, and files travel between meshes."""
    rng = np.random.default_rng(5)
    document, question, short = (rng.integers(1, WIDE.vocab_size, n) for n in (S * 2 + 11, 60, 7))
    told = []
    for shape in (None, (2, 2, 2)):
        llm = LLM(on_mesh(shape), max_len=256, prefill_chunk=S)
        held = llm.prefill(document)
        held.save(tmp_path / str(shape))
        answers = llm.generate([question, short], GREEDY, prefix=held)
        answers.append(llm.generate(short, GREEDY, prefix=llm.load_prefix(tmp_path / "None")))
        told.append(([a.token_ids for a in answers], llm.score(document)))
    assert told[0][0] == told[1][0]
    assert len({*told[0][0][0]}) > 4  # not one token for ever
    np.testing.assert_allclose(told[1][1], told[0][1], rtol=0, atol=2e-5)
    files = [
        load_file(tmp_path / str(shape) / "keys.safetensors")
        | load_file(tmp_path / str(shape) / "values.safetensors")
        for shape in (None, (2, 2, 2))
    ]
    for name, one in files[0].items():
        np.testing.assert_allclose(files[1][name], one, rtol=0, atol=1e-5)


def test_a_cache_grows_where_it_lies() -> None:
    """Every position is held by the device that held it."""
    spread = on_mesh((1, 8, 1)).spread
    assert spread is not None
    empty = init_cache(WIDE, 1, 64, jnp.float32, spread.mesh)
    context = Context(empty, np.zeros(50, np.int32), spread)
    numbered = np.zeros(empty.k.shape, np.float32)
    numbered[:, :, :, context.slots()] = np.arange(50)[:, None]
    context.cache = jax.tree.map(lambda x: jax.device_put(numbered, x.sharding), empty)
    context.reserve(100, 200)
    assert context.cache.capacity == 256
    np.testing.assert_array_equal(np.asarray(context.cache.v)[1, 0, 2, context.slots(), 3], np.arange(50))
    assert context.cache.k.sharding.is_equivalent_to(empty.k.sharding, 5)


def test_a_piece_moves_queries_and_never_the_cache() -> None:
    """What the compiled program sends between devices, and that it works in place."""
    model = on_mesh((1, 4, 2))
    graph, params = nnx.split(model)
    assert model.spread is not None
    mesh, capacity, rows = model.spread.mesh, 1 << 17, 64
    where = cache_shardings(mesh, jnp.float32)
    cache = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract_cache(WIDE, 1, capacity, jnp.float32), where,
    )  # fmt: skip
    compiled = prefill._prefill_piece.lower(
        graph, params, jnp.zeros((1, rows), jnp.int32), jnp.int32(0), jnp.ones(1, jnp.int32), cache,
        jnp.zeros((1, WIDE.hidden_size)), None, jnp.int32(0),
    ).compile()  # fmt: skip
    moved = re.findall(
        r"= \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(",
        compiled.as_text(),
    )
    sizes = [math.prod(map(int, filter(None, shape.split(",")))) for shape in moved]
    assert len(sizes) >= 4
    assert max(sizes) <= rows * max(WIDE.num_heads // 2 * WIDE.head_dim, WIDE.vocab_size, WIDE.hidden_size)
    memory = compiled.memory_analysis()
    mine = 2 * math.prod(cache.k.shape) * 4 // mesh.size
    assert memory.alias_size_in_bytes >= mine
    assert memory.temp_size_in_bytes < mine / WIDE.num_layers / 2


def test_a_chunk_below_a_round_is_refused() -> None:
    with pytest.raises(
        QwenJaxError, match="prefill_chunk=16 is below the 32 positions that context=8 deals out"
    ):
        LLM(on_mesh((1, 8, 1)), prefill_chunk=16)
    assert LLM(on_mesh((1, 8, 1)), prefill_chunk=100)._prefiller.chunk == S
