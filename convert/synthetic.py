"""Random checkpoints of any shape, for tests and benchmarks: the folder a model of that config would have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.convert.hf_folder import plan_shards, write_index
from qwen_jax.convert.safetensors_io import SafetensorsWriter
from qwen_jax.convert.source import DTYPES, tensors

TINY = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Both signs, magnitudes in [2^-7, 2^-6), uniform mantissas: bits that do not compress or repeat."""
    count = math.prod(shape)
    if dtype.itemsize == 4:
        bits = rng.integers(0, 1 << 32, count, np.uint32) & np.uint32(0x807FFFFF) | np.uint32(0x3C000000)
    elif dtype == DTYPES["bfloat16"]:
        bits = rng.integers(0, 1 << 16, count, np.uint16) & np.uint16(0x807F) | np.uint16(0x3C00)
    else:
        bits = rng.integers(0, 1 << 16, count, np.uint16) & np.uint16(0x83FF) | np.uint16(0x2000)
    return bits.view(dtype).reshape(shape)


def write_random_checkpoint(
    folder: Path, raw_config: dict[str, Any], *, seed: int = 0, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes config.json and random weights into a new Hugging Face folder, one tensor in memory at a time.

    Args:
        folder: to be made.
        raw_config: what config.json shall say, `TINY` for instance.
        seed: of the values.
        max_shard_bytes: most bytes a file.
    """
    config = ModelConfig.from_dict(raw_config)
    dtype, rng = DTYPES[config.dtype], np.random.default_rng(seed)
    shapes = {p.hf_name(layer): p.hf_shape(config) for p, layer in tensors(config)}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    plan = plan_shards(sizes, max_shard_bytes)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n", encoding="utf-8")
    for file, names in plan.items():
        with SafetensorsWriter(folder / file, {name: shapes[name] for name in names}, dtype) as writer:
            for name in names:
                writer.write(name, random_tensor(rng, shapes[name], dtype))
    write_index(folder, plan, sum(sizes.values()))
