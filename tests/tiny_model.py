"""A random float32 model of a few thousand parameters whose attention matters, for tests that need no checkpoint on disk."""

import jax
import jax.numpy as jnp
from flax import nnx

from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.model import Qwen2

CONFIG = ModelConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    max_position_embeddings=1024,
    tie_embeddings=False,
    dtype="float32",
    dual_chunk=DualChunk(chunk_size=40, local_size=8, original_max_position_embeddings=48),
    eos_token_ids=(0,),
)


def random_model(config: ModelConfig = CONFIG, seed: int = 0, scale: float = 6.0) -> Qwen2:
    """Weights `scale` times the usual 0.02, biases and norms random too, so that no token repeats itself for ever."""
    model = Qwen2(config, rngs=nnx.Rngs(seed))
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    leaves = [jnp.where(x == 1, 1 + 0.1 * n, scale * 0.02 * n) for x, n in zip(leaves, noise, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))
