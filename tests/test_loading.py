import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax import loading
from qwen_jax.build import with_dca
from qwen_jax.config import ModelConfig
from qwen_jax.convert.converter import convert
from qwen_jax.convert.source import DTYPES, Box, TensorSource, box_shape
from qwen_jax.convert.synthetic import TINY, write_random_checkpoint
from qwen_jax.errors import CheckpointError, QwenJaxError
from qwen_jax.loading import _overflow, _write_layer, load_params, open_checkpoint
from qwen_jax.params import Param, params
from qwen_jax.sharding import full_mesh, shardings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loading") / "hf"
    write_random_checkpoint(folder, TINY, max_shard_bytes=20_000)
    return folder


@pytest.mark.parametrize("collects", [False, True])
def test_values_shapes_and_dtype(folder, monkeypatch, collects):
    monkeypatch.setattr(loading, "_collects", lambda *_: collects)
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    source = open_checkpoint(folder)
    calls: list[tuple[int, int]] = []
    loaded = load_params(source, progress=lambda *call: calls.append(call))
    assert loaded.keys() == {p.path for p in params(source.config)}
    for param in params(source.config):
        array = loaded[param.path]
        assert array.dtype == jnp.bfloat16
        if param.stacked:
            assert array.shape == (3, *param.shape(source.config))
            for layer in range(3):
                assert np.asarray(array[layer]).tobytes() == stored[param.hf_name(layer)].tobytes()
        else:
            assert array.shape == param.shape(source.config)
            assert np.asarray(array).tobytes() == stored[param.hf_name()].tobytes()
    total = sum(t.nbytes for t in stored.values())
    assert source.bytes_read == total
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize("dtype", [jnp.float32, "float16"])
@pytest.mark.parametrize("collects", [False, True])
def test_cast_on_the_way(folder, monkeypatch, dtype, collects):
    monkeypatch.setattr(loading, "_collects", lambda *_: collects)
    source = open_checkpoint(folder)
    loaded, cast = load_params(source), load_params(source, dtype=dtype)
    for path, array in cast.items():
        assert array.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(array), np.asarray(loaded[path]).astype(dtype))


def test_a_value_that_the_target_cannot_hold(tmp_path):
    write_random_checkpoint(tmp_path / "hf", TINY)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = -70_000
    save_file(tensors, file)
    source = open_checkpoint(tmp_path / "hf")
    load_params(source, dtype=jnp.float32)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds values that float16 cannot"
    ):
        load_params(source, dtype=jnp.float16)
    with pytest.raises(QwenJaxError, match="dtype int8 is not one of bfloat16, float16, float32"):
        load_params(source, dtype=jnp.int8)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("target", DTYPES.values())
def test_overflow_is_the_first_magnitude_that_becomes_infinite(dtype, target):
    first = _overflow(dtype, target)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    pair = np.array([first - 1, first], unsigned).view(dtype).astype(np.float32)
    with np.errstate(over="ignore"):
        assert np.isinf(pair.astype(target)).tolist() == [False, True]


def test_nan_is_refused_on_loading(tmp_path):
    write_random_checkpoint(tmp_path / "hf", TINY)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.self_attn.k_proj.bias"][0] = np.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.k_proj\.bias holds NaN or infinity"):
        load_params(open_checkpoint(tmp_path / "hf"))


@pytest.mark.parametrize("dtype", ["bf16", "int8", 5])
def test_another_dtype_is_refused(folder, dtype):
    with pytest.raises(QwenJaxError, match="is not one of bfloat16, float16, float32"):
        load_params(open_checkpoint(folder), dtype=dtype)


def test_dca_takes_nothing_but_a_dual_chunk(folder):
    with pytest.raises(QwenJaxError, match="dca takes a DualChunk, False or None"):
        with_dca(open_checkpoint(folder).config, (32768, 4096))


def test_layers_are_written_in_place(folder):
    """The donated stack is aliased to the result, and no temporary as large as a layer exists."""
    config = open_checkpoint(folder).config
    sharding = shardings(config, full_mesh())["layers.mlp.down.weight"]
    stack = jax.ShapeDtypeStruct((64, 512, 512), jnp.float32, sharding=sharding)
    layer = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    compiled = _write_layer.lower((stack,), layer, np.int32(0), (sharding,)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 64 * 512 * 512 * 4
    assert memory.temp_size_in_bytes < 512 * 512 * 4


class CountingSource(TensorSource):
    """Hands out zeros, and keeps the most bytes that were alive at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(Path("counting"), config)
        self.reads: list[tuple[str, int | None]] = []

    def name(self, param: Param, layer: int | None = None) -> str:
        return param.hf_name(layer)

    def _read(self, param: Param, layer: int | None, box: Box, out: np.ndarray | None) -> np.ndarray:
        self.reads.append((param.path, layer))
        array = np.empty(box_shape(box), self.dtype) if out is None else out
        array[...] = 0
        return array


def test_each_tensor_is_read_once_and_alone(folder):
    source = CountingSource(open_checkpoint(folder).config)
    load_params(source)
    assert len(source.reads) == len(set(source.reads)) == 3 * 12 + 3


def test_eight_devices_read_what_they_own(tmp_path):
    raw = TINY | {
        "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 512,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    write_random_checkpoint(tmp_path / "hf", raw, max_shard_bytes=2_000_000)
    convert(tmp_path / "hf", tmp_path / "orbax")
    program = Path(__file__).with_name("loading_on_eight_devices.py")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "hf"), str(tmp_path / "orbax")],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    report = {entry["case"]: entry for entry in json.loads(done.stdout)}
    assert len(report) == 8
    for case, entry in report.items():
        assert entry["equal"], case
        assert entry["read"] <= 1.05 * entry["owned"], case
        # The kernel's own count, which also sees headers, metadata and whatever jax reads: the allowance is for those.
        assert entry["read_by_process"] <= 1.05 * entry["owned"] + 200_000, case
    assert report["hf context,tensor"]["shards"] == 8
    assert report["hf context,tensor"]["q_shard"] == [3, 2, 16, 128]
    assert report["orbax tensor"]["down_shard"] == [3, 128, 128]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_one_process_of_a_pod_reads_its_share(tmp_path, dtype, kind):
    """A quarter of the heads, MLP and vocabulary: what a process that owns one of four tensor shards asks for."""
    raw = TINY | {
        "num_key_value_heads": 4, "vocab_size": 512, "intermediate_size": 128, "torch_dtype": np.dtype(dtype).name,
    }  # fmt: skip
    write_random_checkpoint(tmp_path / "hf", raw)
    if kind == "orbax":
        convert(tmp_path / "hf", tmp_path / "orbax")
    source, whole = open_checkpoint(tmp_path / kind), open_checkpoint(tmp_path / "hf")
    owned = 0
    for param in params(source.config):
        shape = param.shape(source.config)
        index = [slice(None)] * len(shape)
        axis = next((i for i, letter in enumerate(param.letters) if letter in "NKFV"), None)
        if axis is not None:
            index[axis] = slice(shape[axis] // 2, shape[axis] // 2 + shape[axis] // 4)
        for layer in range(3) if param.stacked else [None]:
            part = source.read(param, layer, tuple(index))
            np.testing.assert_array_equal(part, whole.read(param, layer)[tuple(index)])
            owned += part.nbytes
    assert owned <= source.bytes_read <= 1.05 * owned
