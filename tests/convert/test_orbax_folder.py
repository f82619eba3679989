"""Converted folders: what orbax itself reads from them, slices, and damage."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.config import ModelConfig
from qwen_jax.convert.converter import convert, open_checkpoint
from qwen_jax.convert.orbax_folder import OrbaxWriter, split_axis, stored_shape
from qwen_jax.convert.source import leaf_name, tensors
from qwen_jax.convert.synthetic import TINY, write_random_checkpoint
from qwen_jax.errors import CheckpointError
from qwen_jax.params import params
from qwen_jax.sharding import widest_tensor

# The released shapes whose dimensions are hardest to cut: 7B (4 KV heads), 14B (F / 8 is below D), and an odd vocabulary.
SHAPES = {
    "7B": (152_064, 3584, 18_944, 28, 28, 4),
    "14B": (152_064, 5120, 13_824, 48, 40, 8),
    "72B": (152_064, 8192, 29_568, 80, 64, 8),
    "3B": (151_936, 2048, 11_008, 36, 16, 2),
    "odd vocabulary": (151_665, 2048, 11_008, 36, 16, 2),
    "prime vocabulary": (151_667, 896, 4864, 24, 14, 2),
}
_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder and what it converts to; not to be changed."""
    base = tmp_path_factory.mktemp("orbax")
    write_random_checkpoint(base / "hf", TINY)
    convert(base / "hf", base / "orbax")
    return base / "hf", base / "orbax"


@pytest.fixture
def damaged(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the converted folder, to be damaged."""
    return shutil.copytree(folders[1], tmp_path / "damaged")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def read_all(folder: Path) -> list[bytes]:
    source = open_checkpoint(folder)
    return [source.read(param, layer).tobytes() for param, layer in tensors(source.config)]


def test_orbax_reads_the_same_leaves(folders):
    hf = open_checkpoint(folders[0])
    leaves = ocp.load(folders[1] / "params")
    assert leaves.keys() == {leaf_name(p, layer) for p, layer in tensors(hf.config)}
    for param, layer in tensors(hf.config):
        leaf = leaves[leaf_name(param, layer)]
        assert leaf.dtype == hf.dtype
        assert leaf.tobytes() == hf.read(param, layer).tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_slices_equal_those_of_the_hf_folder(folders, data):
    hf, orbax = open_checkpoint(folders[0]), open_checkpoint(folders[1])
    param, layer = data.draw(st.sampled_from(list(tensors(hf.config))))
    index = []
    for size in param.shape(hf.config):
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    a, b = hf.read(param, layer, tuple(index)), orbax.read(param, layer, tuple(index))
    assert a.shape == b.shape == tuple(s.stop - s.start for s in index)
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_pieces_suit_every_tensor_mesh(shape):
    raw = TINY | dict(zip((*_KEYS, "num_key_value_heads"), shape, strict=True))
    config = ModelConfig.from_dict(raw)
    for param in params(config):
        stored, axis = stored_shape(param, config, 2), split_axis(param)
        if axis is None:
            assert stored == param.shape(config)
            continue
        pieces, size = stored[axis], param.shape(config)[axis]
        assert pieces * stored[axis + 1] == size
        assert math.prod(stored) == math.prod(param.shape(config))
        # A mesh whose tensor axis divides the widest one cuts between pieces.
        assert pieces % widest_tensor(config) == 0
        assert pieces <= 1024
        whole = math.prod(stored) * 2
        if shape[0] != 151_667 or "V" not in param.letters:
            assert whole // pieces <= 48 << 20


def test_unfinished_or_empty_params(damaged):
    next((damaged / "params").glob("*/manifest.ocdbt")).unlink()
    refused(damaged, "params: not a finished orbax checkpoint")
    shutil.rmtree(damaged / "params")
    (damaged / "params").mkdir()
    refused(damaged, "params: not a finished orbax checkpoint")


def test_partial_save_of_orbax_does_not_open(damaged):
    (damaged / "params").rename(damaged / "params.partial_save")
    refused(damaged, "no weights")


def test_both_formats_in_one_folder(damaged, folders):
    shutil.copy(folders[0] / "model.safetensors", damaged)
    refused(damaged, "holds both safetensors and params/")


def test_config_that_disagrees(damaged):
    def set_config(**changes):
        (damaged / "config.json").write_text(json.dumps(TINY | changes))

    set_config(num_hidden_layers=4)
    refused(damaged, r"missing layers\.3\.input_norm\.weight, .* and 9 more$")
    set_config(num_hidden_layers=2)
    refused(damaged, r"layers\.2\..* and 9 more not part of the model")
    set_config(vocab_size=98)
    refused(damaged, r"embed.weight is \[96, 32\] where config.json says \[98, 32\]")
    set_config(torch_dtype="float16")
    refused(damaged, "stored as bfloat16 where config.json says float16")


def test_data_file_gone_or_cut(damaged, folders):
    files = [file for file in (damaged / "params").glob("**/d/*") if file.stat().st_size > 20_000]
    assert files
    kept = {file: file.read_bytes() for file in files}
    for spoil in (lambda f: f.unlink(), lambda f: f.write_bytes(kept[f][: len(kept[f]) // 2])):
        for file in files:
            spoil(file)
        with pytest.raises(CheckpointError, match="damaged") as caught:
            read_all(damaged)
        assert "\n" not in str(caught.value)
        for file, content in kept.items():
            file.write_bytes(content)
    assert read_all(damaged) == read_all(folders[0])


def test_manifest_damaged(damaged):
    manifest = next((damaged / "params").glob("*/manifest.ocdbt"))
    manifest.write_bytes(manifest.read_bytes()[:-7])
    refused(damaged, "params is damaged")


def test_nan_in_a_converted_folder(folders, tmp_path):
    source = open_checkpoint(folders[0])
    leaves = {leaf_name(p, layer): source.read(p, layer) for p, layer in tensors(source.config)}
    leaves["layers.1.mlp.down.weight"][3, 3] = np.nan
    writer = OrbaxWriter(tmp_path, source.config, source.dtype)
    writer.write(leaves)
    writer.finish()
    shutil.copy(folders[0] / "config.json", tmp_path)
    source = open_checkpoint(tmp_path)
    down = next(p for p in params(source.config) if p.path == "layers.mlp.down.weight")
    source.read(down, 0)
    with pytest.raises(CheckpointError, match=r"tensor layers\.1\.mlp\.down\.weight holds NaN or infinity"):
        source.read(down, 1)
