"""The network against a float64 oracle, its gradient, its compiled size, and eight devices against one."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import load_file

import qwen_jax
from qwen_jax import LLM, SamplingParams
from qwen_jax.build import build
from qwen_jax.cache import abstract_cache
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.errors import QwenJaxError
from qwen_jax.model import Qwen2
from qwen_jax.params import params
from qwen_jax.sharding import full_mesh, shardings
from tests.oracle import Oracle, dual_chunk_distances, temperatures
from tests.tiny_model import CONFIG, random_model

GOLDENS = Path(__file__).parent / "goldens"
SHARP = 2e-5  # most error of a logit, as a share of the largest; float32 reaches some 1e-6


def oracle_of(folder: Path) -> Oracle:
    """The checkpoint as its files hold it; plain rotary positions."""
    tensors = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    return Oracle(tensors, {**config, **rope})


def hf_tensors(model: Qwen2) -> dict[str, np.ndarray]:
    """The model's parameters by their Hugging Face names and shapes, float64."""
    state = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    out = {}
    for p in params(model.config):
        value = np.asarray(state[p.path], np.float64)
        for layer in range(model.config.num_layers) if p.stacked else [None]:
            tensor = value if layer is None else value[layer]
            out[p.hf_name(layer)] = tensor.reshape(p.hf_shape(model.config))
    return out


def oracle_config(config: ModelConfig) -> dict[str, object]:
    return {
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }


def expected(oracle: Oracle, tokens_T: np.ndarray, dca: DualChunk | None) -> np.ndarray:
    """Logits of a whole prompt: every token carries m(T)."""
    if dca is None:
        return oracle.logits(tokens_T)
    T = len(tokens_T)
    m_T = temperatures(T, T, dca.original_max_position_embeddings)
    return oracle.logits(tokens_T, dual_chunk_distances(T, dca.chunk_len, dca.saturation), m_T)


@pytest.mark.parametrize(
    ("name", "dca"),
    [
        ("tied_g7_h64", None),
        ("tied_g7_h64", DualChunk(24, 8)),
        ("tied_g7_h64", DualChunk(24, 8, clip=23)),
        ("tied_g7_h64", DualChunk(24, 8, 16)),
        ("untied_g5_h128_sharded", DualChunk(64, 8, 32)),
    ],
    ids=["plain", "dca", "report", "temperature", "two-chunks"],
)
def test_logits_of_padded_rows(name: str, dca: DualChunk | None) -> None:
    """Rows of 70 (five chunks of 16, the last one short), 33 and 1 tokens: each as alone, at its own temperature."""
    model = qwen_jax.load(GOLDENS / name, dca=dca)
    oracle = oracle_of(GOLDENS / name)
    lengths = np.array([70, 33, 1])
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=(3, 70))
    logits = np.asarray(model(tokens, lengths))
    for row, n, ours in zip(tokens, lengths, logits, strict=True):
        want = expected(oracle, row[:n], dca)
        assert np.abs(ours[:n] - want).max() < SHARP * np.abs(want).max()


def test_dual_chunk_is_plain_rope_up_to_the_clip_and_one_more() -> None:
    dca = DualChunk(56, 8)
    plain, chunked = (qwen_jax.load(GOLDENS / "tied_g7_h64", dca=d) for d in (None, dca))
    tokens = np.random.default_rng(1).integers(plain.config.vocab_size, size=(3, 70))
    # A causal model: the first L logits are those of a prompt of L tokens.
    a, b = (np.asarray(model(tokens))[0] for model in (plain, chunked))
    error_T = np.abs(a - b).max(-1) / np.abs(a).max()
    assert error_T[: dca.saturation + 1].max() < SHARP
    assert error_T[dca.saturation + 2 :].min() > 100 * SHARP


def test_more_tokens_than_positions_are_refused() -> None:
    """The tables of angles end there; with dual chunk attention no angle is ever past the clip."""
    config = dataclasses.replace(CONFIG, max_position_embeddings=32)
    tokens = np.zeros((1, 33), np.int32)
    with pytest.raises(QwenJaxError, match=r"33 tokens .* 32 positions"):
        random_model(dataclasses.replace(config, dual_chunk=None))(tokens)
    bounded = nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(bounded)
    out = jax.eval_shape(lambda state: nnx.merge(graph, state)(tokens), state)
    assert out.shape == (1, 33, config.vocab_size)


def test_gradient() -> None:
    """Of every parameter, along some direction, against a finite difference of the float64 oracle."""
    config = dataclasses.replace(CONFIG, num_layers=2, tie_embeddings=True)
    dca = config.dual_chunk
    model = random_model(config)
    rng = np.random.default_rng(3)
    T = 70
    tokens_T = rng.integers(config.vocab_size, size=T)
    weight_TV = rng.standard_normal((T, config.vocab_size)) / T
    graph, state = nnx.split(model)

    @jax.jit
    @jax.grad
    def gradient(state: nnx.State) -> jax.Array:
        return jnp.sum(weight_TV * nnx.merge(graph, state)(tokens_T[None])[0])

    grads = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(gradient(state))}
    tensors = hf_tensors(model)

    def loss(moved: dict[str, np.ndarray]) -> float:
        oracle = Oracle({**tensors, **moved}, oracle_config(config))
        return float(np.sum(weight_TV * expected(oracle, tokens_T, dca)))

    step = 1e-4
    for p in params(config):
        grad = np.asarray(grads[p.path], np.float64)
        # Along the gradient and a random half as long: a wrong sign, factor or entry all show.
        noise = rng.standard_normal(grad.shape)
        direction = grad / np.linalg.norm(grad) + 0.5 * noise / np.linalg.norm(noise)
        names = [p.hf_name(n) for n in (range(config.num_layers) if p.stacked else [None])]
        parts = dict(zip(names, direction if p.stacked else [direction], strict=True))
        ends = [
            loss(
                {
                    name: tensors[name] + sign * step * d.reshape(tensors[name].shape)
                    for name, d in parts.items()
                }
            )
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert np.sum(grad * direction) == pytest.approx(slope, rel=2e-4), p.path


# What is compiled.


def programs(num_layers: int) -> dict[str, str]:
    """StableHLO of every way the model runs, at this depth."""
    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    graph, state = nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0))))
    cache = abstract_cache(config, 2, 64, jnp.float32)
    tokens, row = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)

    def text(run: Callable[..., object], *args: object) -> str:
        return jax.jit(lambda state, *args: run(nnx.merge(graph, state), *args)).lower(state, *args).as_text()

    def train(model: Qwen2, tokens: jax.Array) -> object:
        graph, state = nnx.split(model)
        return jax.grad(lambda state: nnx.merge(graph, state)(tokens).sum())(state)

    return {
        "call": text(lambda model, tokens: model(tokens), tokens),
        "train": text(train, tokens),
        "extend": text(Qwen2.extend, tokens, cache, scalar, row),
        "step": text(Qwen2.step, row, cache, row, row),
    }


def test_the_layers_compile_once() -> None:
    """Twenty layers are the program of two, line for line, but for the sizes in it."""
    shallow, deep = programs(2), programs(20)
    for name, text in shallow.items():
        assert deep[name].count("\n") == text.count("\n"), name
        assert text.count("dot_general") > 5


# Eight devices.


WIDE = dataclasses.replace(CONFIG, vocab_size=96, num_heads=16, num_kv_heads=8, num_layers=2)


@functools.cache
def wide_model() -> Qwen2:
    return random_model(WIDE)


def spread(model: Qwen2, shape: tuple[int, int, int]) -> Qwen2:
    """The same model on a mesh of data x context x tensor."""
    assert math.prod(shape) == len(jax.devices()), "tests/conftest.py asks for eight"
    mesh = full_mesh(Mesh(np.array(jax.devices()).reshape(shape), ("data", "context", "tensor")))
    where = shardings(model.config, mesh)
    leaves = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    return build(model.config, {path: jax.device_put(x, where[path]) for path, x in leaves.items()})


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2)], ids=str)
def test_eight_devices_give_the_logits_of_one(shape: tuple[int, int, int]) -> None:
    one, eight = wide_model(), spread(wide_model(), shape)
    weight = eight.layers.attn.q.weight[...]
    assert weight.addressable_shards[0].data.shape[1] == WIDE.num_heads // shape[2]
    tokens = np.random.default_rng(4).integers(WIDE.vocab_size, size=(2, 70))
    lengths = np.array([70, 41])
    a, b = (np.asarray(model(tokens, lengths)) for model in (one, eight))
    np.testing.assert_array_equal(a[0], one(tokens)[0])  # without lengths, whole rows
    for ours, other, n in zip(a, b, lengths, strict=True):
        assert np.abs(ours[:n] - other[:n]).max() < SHARP * np.abs(ours).max()


def test_eight_devices_answer_as_one() -> None:
    """Cache and loops go where the weights are, with no word about a mesh."""
    prompts = [np.random.default_rng(5).integers(1, WIDE.vocab_size, size=n) for n in (60, 7)]
    answers = []
    for model in (wide_model(), spread(wide_model(), (1, 2, 4))):
        llm = LLM(model, max_len=128, prefill_chunk=32)
        out = llm.generate(prompts, SamplingParams(max_new_tokens=24, greedy=True, ignore_eos=True))
        answers.append([answer.token_ids for answer in out])
    assert answers[0] == answers[1]
    assert len({*answers[0][0], *answers[0][1]}) > 4  # not one token for ever


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 97]], "token id 97 is outside the vocabulary of 97 tokens"),
        ([[-1]], "token id -1 is outside"),
        ([1, 2], r"takes int32\[B, T\]"),
        (np.zeros((1, 0), int), "at least one token"),
    ],
)
def test_tokens_that_are_no_batch_of_ids_are_refused(tokens: object, message: str) -> None:
    with pytest.raises(QwenJaxError, match=message):
        random_model()(np.asarray(tokens))
