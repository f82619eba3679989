"""A random float32 model of a few thousand parameters whose attention matters, for tests that need no checkpoint on disk."""

import jax.numpy as jnp
import numpy as np

from qwen_jax.build import build
from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.model import Qwen2
from qwen_jax.params import params

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
    """Weights `scale` times the usual 0.02, biases and norms random too, so that no token repeats itself for ever.

    Drawn by NumPy: JAX would compile a generator for every shape, which takes longer than most tests.
    """
    rng = np.random.default_rng(seed)
    arrays = {}
    for p in params(config):
        noise = rng.standard_normal(((config.num_layers,) if p.stacked else ()) + p.shape(config))
        value = 1 + 0.1 * noise if "norm" in p.path else scale * 0.02 * noise
        arrays[p.path] = jnp.asarray(value, config.dtype)
    return build(config, arrays)
