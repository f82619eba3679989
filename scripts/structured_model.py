"""Random weights whose heads look where trained ones do: at bands of distances, at the first tokens, and a little everywhere.

Weights drawn at random scatter their attention, which no trained model does, so sparse attention could not be timed on them.
Here each head's query and key biases are one vector seen through two rotations: the score of a pair is then a bump around
each of some distances, the first of them 0. The first tokens of a prompt have embeddings whose keys answer
the slowest pair of every query: sinks. What is left of the projections is noise on top.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from qwen_jax.build import build
from qwen_jax.config import ModelConfig
from qwen_jax.linear import WEIGHT_DTYPES, quantise
from qwen_jax.model import Qwen2
from qwen_jax.params import Param, params
from qwen_jax.rope import inverse_frequencies
from qwen_jax.sharding import ShardingRules, full_mesh, shardings

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
    matmul: str | None = None,
    mesh: Mesh | None = None,
) -> Qwen2:
    """A model of this config and dtype, made on its devices a layer at a time; the same numbers on any mesh.

    Args:
        farthest: largest distance a band lies at, tokens.
        bands: distances a head looks at, 0 included. Each becomes several separate bands of chosen lines, as the pairs that
            make the bump come into step again.
        turns: tokens a radian of the fastest and of the slowest pair that make the bump: its sharpness and its reach.
        matmul, mesh: as `qwen_jax.load` takes them.
    """
    H, D, L = config.head_dim, config.hidden_size, config.num_layers
    q_bias, k_bias = _biases(config, farthest, bands, turns, seed)
    sink_D = jax.random.rademacher(jax.random.key(seed), (D,), jnp.float32)
    slowest, sink = H // 2 - 1, np.sqrt(_SINK * np.sqrt(H))
    q_bias[..., slowest] += sink
    dtype, numbers = jnp.dtype(config.dtype), WEIGHT_DTYPES[matmul] if matmul else None

    def tensor(p: Param, n: int, layer: jax.Array) -> tuple[jax.Array, ...]:
        """One layer's, or the only one; numbers and scales if it has 8 bits."""
        shape = p.shape(config)
        if "norm" in p.path:
            return (jnp.ones(shape, dtype),)
        if p.path.endswith("bias"):
            given = {"q": q_bias, "k": k_bias}.get(p.path.split(".")[-2])
            return (jnp.zeros(shape, dtype) if given is None else jnp.asarray(given)[layer].astype(dtype),)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), n), layer)
        x = 0.02 * jax.random.normal(key, shape, dtype)
        if p.path == "embed.weight":
            x = x.at[:SINKS].set((100 * sink_D).astype(dtype))
        if p.path in ("layers.attn.q.weight", "layers.attn.k.weight"):
            x *= _NOISE
        if p.path == "layers.attn.k.weight":
            x = x.at[:, slowest].add((sink / D * sink_D).astype(dtype))
        if numbers is None or not p.is_layer_matrix:
            return (x,)
        return quantise(x, numbers, range(len(p.out_letters), x.ndim))

    where = full_mesh(mesh)
    placed = shardings(config, where)

    def make(p: Param, n: int) -> dict[str, jax.Array]:
        names, places = [p.path], [placed[p.path]]
        if numbers is not None and p.is_layer_matrix:
            names.append(p.scale_path)
            places.append(NamedSharding(where, ShardingRules().spec("L" + p.out_letters)))

        def whole() -> tuple[jax.Array, ...]:
            if not p.stacked:
                return tensor(p, n, jnp.int32(0))
            return lax.map(lambda layer: tensor(p, n, layer), jnp.arange(L))

        return dict(zip(names, jax.jit(whole, out_shardings=tuple(places))(), strict=True))

    arrays: dict[str, jax.Array] = {}
    with ThreadPoolExecutor() as pool:  # each is a program of its own to compile
        for made in pool.map(make, params(config), range(len(params(config)))):
            arrays |= made
    return build(config, arrays, matmul=matmul)


def _biases(
    config: ModelConfig, farthest: int, bands: int, turns: tuple[float, float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of queries float32[L, N, H] and of keys float32[L, K, H]: one vector, seen through the distances of the bands."""
    N, K, H, L = config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers
    speeds, _ = inverse_frequencies(config.rope_theta, H, None)
    distances = np.stack([band_distances(N, farthest, bands, seed + layer) for layer in range(L)])
    # Faster pairs would scatter single lines; the slowest of all, which hardly turns, carries the sinks.
    used = (speeds < 1 / turns[0]) & (speeds > 1 / turns[1])
    amplitude = np.sqrt(_PEAK * np.sqrt(H) / used.sum()) * used
    angles_LNCH = distances[..., None] * speeds
    q_bias = _pairs((amplitude * np.exp(-1j * angles_LNCH)).sum(2))
    return q_bias, _pairs(np.broadcast_to(amplitude + 0j, (L, K, H // 2)))


def _pairs(z: np.ndarray) -> np.ndarray:
    """Complex [..., H / 2] as the half-split real pairs [..., H] that the rotation turns."""
    return np.concatenate([z.real, z.imag], axis=-1).astype(np.float32)
