"""`load`: a checkpoint's config and tensors become a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.convert import Progress
from qwen_jax.errors import ConfigError
from qwen_jax.hub import resolve
from qwen_jax.loading import load_params, open_checkpoint
from qwen_jax.model import Qwen2


def load(
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    dca: DualChunk | Literal[False] | None = None,
    progress: Progress | None = None,
) -> Qwen2:
    """Loads a model: `model(tokens int32[B, T]) -> float32[B, T, V]`, `model.config`.

    Args:
        path: a Hugging Face folder, a converted folder, or a hub id ("Qwen/Qwen2.5-7B-Instruct-1M").
        dtype: of the weights and activations: bfloat16, float16 or float32; default: the checkpoint's.
        mesh: devices to shard onto, axes among data, context, tensor; default: the mesh set by `jax.set_mesh`, else one device.
        dca: dual chunk attention to use in place of the config's; False switches it off.
        progress: called with (bytes placed, bytes in all).

    Raises:
        QwenJaxError: anything wrong with the folder, its config or its tensors, in one line; a mesh that does not
            divide the model.
    """
    source = open_checkpoint(resolve(path))
    config = with_dca(source.config, dca)
    return build(config, load_params(source, mesh=mesh, dtype=dtype, progress=progress))


def with_dca(config: ModelConfig, dca: DualChunk | Literal[False] | None) -> ModelConfig:
    """The config with dual chunk attention replaced (a DualChunk), removed (False) or kept (None)."""
    if dca is None:
        return config
    if dca is not False and not isinstance(dca, DualChunk):
        raise ConfigError(f"dca takes a DualChunk, False or None, got {dca!r:.80}")
    return dataclasses.replace(config, dual_chunk=dca or None)


def build(config: ModelConfig, arrays: dict[str, jax.Array]) -> Qwen2:
    """A model around given parameters, by `Param.path`, stacked ones with their leading axis L; nothing is copied."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Qwen2(config, rngs=nnx.Rngs(0))))
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        array = arrays[".".join(map(str, path))]
        assert array.shape == leaf.shape, (path, array.shape, leaf.shape)
        filled.append((path, leaf.replace(array)))
    assert len(filled) == len(arrays), sorted(arrays)
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    devices = arrays["embed.weight"].devices()
    if len(devices) > 1 or {device.platform for device in devices} != {"gpu"}:
        model.attention_backend = (
            "xla"  # the GPU kernels see one device's arrays; XLA partitions its own attention
        )
    return model
