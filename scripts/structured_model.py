"""Random weights whose heads look where trained ones do: at bands of distances, at the first tokens, and a little everywhere.

Weights drawn at random scatter their attention, which no trained model does, so sparse attention could not be timed on them.
Here each head's query and key biases are one vector seen through two rotations: the score of a pair is then a bump around
each of some distances, the first of them 0. The first tokens of a prompt have embeddings whose keys answer
the slowest pair of every query: sinks. What is left of the projections is noise on top.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen_jax.config import ModelConfig
from qwen_jax.model import Qwen2
from qwen_jax.rope import inverse_frequencies

SINKS = 4  # token ids 0 .. 3, which a prompt begins with
_PEAK = 10.0  # score at the middle of a band, in nats
_SINK = 12.0  # score of a sink, in nats
_NOISE = 0.2  # of the projections, relative to what a random model has


def band_distances(heads: int, farthest: int, bands: int, seed: int = 0) -> np.ndarray:
    """int64[heads, bands]: distance 0 and others spread over the logarithm up to `farthest`, jittered by head."""
    rng = np.random.default_rng(seed)
    steps = np.linspace(0, 1, bands)[1:] + rng.uniform(-0.4, 0.4, (heads, bands - 1)) / bands
    far = np.exp(np.log(256) + np.clip(steps, 0, 1) * (np.log(farthest) - np.log(256)))
    return np.concatenate([np.zeros((heads, 1)), far], axis=1).astype(np.int64)


def structured_model(
    config: ModelConfig,
    *,
    farthest: int,
    bands: int = 4,
    turns: tuple[float, float] = (500, 50_000),
    seed: int = 0,
) -> Qwen2:
    """A model of this config and dtype on the default device, made there.

    Args:
        farthest: largest distance a band lies at, tokens.
        bands: distances a head looks at, 0 included. Each becomes several separate bands of chosen lines, as the pairs that
            make the bump come into step again.
        turns: tokens a radian of the fastest and of the slowest pair that make the bump: its sharpness and its reach.
    """
    N, H, theta = config.num_heads, config.head_dim, config.rope_theta
    speeds, _ = inverse_frequencies(theta, H, None)
    distances = np.stack(
        [band_distances(N, farthest, bands, seed + layer) for layer in range(config.num_layers)]
    )
    # Faster pairs would scatter single lines; the slowest of all, which hardly turns, carries the sinks.
    used = (speeds < 1 / turns[0]) & (speeds > 1 / turns[1])
    amplitude = np.sqrt(_PEAK * np.sqrt(H) / used.sum()) * used
    angles_LNCH = distances[..., None] * speeds
    q_bias = _pairs((amplitude * np.exp(-1j * angles_LNCH)).sum(2))
    k_bias = _pairs(np.broadcast_to(amplitude + 0j, (config.num_layers, config.num_kv_heads, H // 2)))
    q_bias[..., H // 2 - 1] += np.sqrt(_SINK * np.sqrt(H))

    @functools.partial(jax.jit, static_argnums=0)
    def build(static: ModelConfig, q_bias: jax.Array, k_bias: jax.Array) -> nnx.State:
        model = Qwen2(static, rngs=nnx.Rngs(seed))
        attn = model.layers.attn
        sink_D = jax.random.rademacher(jax.random.key(seed), (static.hidden_size,), jnp.float32)
        q_weight, k_weight = (x.weight[...] * _NOISE for x in (attn.q, attn.k))
        answer = np.sqrt(_SINK * np.sqrt(H)) / static.hidden_size
        k_weight = k_weight.at[:, :, H // 2 - 1].add((answer * sink_D).astype(k_weight.dtype))
        attn.q.weight[...], attn.k.weight[...] = q_weight, k_weight
        attn.q.bias[...] = q_bias.astype(q_weight.dtype)
        attn.k.bias[...] = k_bias.astype(k_weight.dtype)
        embed = model.embed.weight[...]
        model.embed.weight[...] = embed.at[:SINKS].set((100 * sink_D).astype(embed.dtype))
        return nnx.state(model)

    graph = nnx.graphdef(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(seed))))
    return nnx.merge(graph, build(config, jnp.asarray(q_bias), jnp.asarray(k_bias)))


def _pairs(z: np.ndarray) -> np.ndarray:
    """Complex [..., H / 2] as the half-split real pairs [..., H] that the rotation turns."""
    return np.concatenate([z.real, z.imag], axis=-1).astype(np.float32)
