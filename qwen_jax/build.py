"""`load`: a checkpoint's config and tensors become a model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.convert import Progress
from qwen_jax.devices import DeviceError
from qwen_jax.errors import ConfigError
from qwen_jax.hub import resolve
from qwen_jax.linear import WEIGHT_DTYPES, check_weight_dtype
from qwen_jax.loading import load_params, open_checkpoint
from qwen_jax.model import Qwen2
from qwen_jax.sharding import full_mesh
from qwen_jax.spread import Spread

_FP8_CAPABILITY = 8.9  # Ada; Hopper has 9.0


def load(
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    dca: DualChunk | Literal[False] | None = None,
    weight_dtype: str | None = None,
    matmul: str | None = None,
    progress: Progress | None = None,
) -> Qwen2:
    """Loads a model: `model(tokens int32[B, T]) -> float32[B, T, V]`, `model.config`.

    Args:
        path: a Hugging Face folder, a converted folder, or a hub id ("Qwen/Qwen2.5-7B-Instruct-1M").
        dtype: of the weights and activations: bfloat16, float16 or float32; default: the checkpoint's.
        mesh: devices to shard onto, axes among data, context, tensor; default: the mesh set by `jax.set_mesh`, else one device.
        dca: dual chunk attention to use in place of the config's; False switches it off.
        weight_dtype: "int8" or "fp8" (e4m3): the layers' matrices are held in 8 bits, with a float32 scale for each output,
            rounded layer by layer while they are read; the rest stays in `dtype`.
        matmul: "fp8": fp8 weights, and prefill rounds the activations that meet them to fp8 too, with one factor a token;
            None: products in `dtype`. Only NVIDIA GPUs of compute capability 8.9 and above gain by it.
        progress: called with (bytes placed, bytes in all).

    Raises:
        QwenJaxError: anything wrong with the folder, its config or its tensors, in one line; a mesh that does not
            divide the model.
    """
    numbers = check_weight_dtype(weight_dtype, matmul)
    if matmul:
        _check_multiplies_fp8(full_mesh(mesh).devices.flat[0])
    source = open_checkpoint(resolve(path))
    config = with_dca(source.config, dca)
    arrays = load_params(source, mesh=mesh, dtype=dtype, weight_dtype=numbers, progress=progress)
    return build(config, arrays, matmul=matmul)


def _check_multiplies_fp8(device: jax.Device) -> None:
    """Refuses NVIDIA GPUs that would turn every number to 16 bits first; CPUs do that too, which is for tests."""
    capability = str(getattr(device, "compute_capability", ""))
    if re.fullmatch(r"\d+\.\d+", capability) and float(capability) < _FP8_CAPABILITY:
        raise DeviceError(
            f"matmul='fp8' needs a GPU of compute capability {_FP8_CAPABILITY} or more, {device.device_kind} has {capability}: "
            "weight_dtype='fp8' alone saves the memory"
        )


def with_dca(config: ModelConfig, dca: DualChunk | Literal[False] | None) -> ModelConfig:
    """The config with dual chunk attention replaced (a DualChunk), removed (False) or kept (None)."""
    if dca is None:
        return config
    if dca is not False and not isinstance(dca, DualChunk):
        raise ConfigError(f"dca takes a DualChunk, False or None, got {dca!r:.80}")
    return dataclasses.replace(config, dual_chunk=dca or None)


def build(config: ModelConfig, arrays: dict[str, jax.Array], *, matmul: str | None = None) -> Qwen2:
    """A model around given parameters, by `Param.path`, stacked ones with their leading axis L; nothing is copied.

    Where the layers' matrices have 8 bits their scales stand at `Param.scale_path`. `matmul` as in `load`.
    """
    weight_dtype = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}.get(
        arrays["layers.attn.q.weight"].dtype
    )

    def empty() -> Qwen2:
        return Qwen2(config, weight_dtype=weight_dtype, matmul=matmul, rngs=nnx.Rngs(0))

    graph, state = nnx.split(nnx.eval_shape(empty))
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        array = arrays[".".join(map(str, path))]
        assert array.shape == leaf.shape, (path, array.shape, leaf.shape)
        filled.append((path, leaf.replace(array)))
    assert len(filled) == len(arrays), sorted(arrays)
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    embedding = arrays["embed.weight"]
    if isinstance(mesh := getattr(embedding.sharding, "mesh", None), Mesh):
        model.spread = Spread.of(config, full_mesh(mesh))
    if {device.platform for device in embedding.devices()} != {jax.default_backend()}:
        model.attention_backend = "xla"  # kernels look at the machine, not at where these weights are
    return model
