import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from qwen_jax.convert.converter import convert, open_checkpoint
from qwen_jax.convert.safetensors_io import SafetensorsWriter
from qwen_jax.convert.source import tensors
from qwen_jax.convert.staging import staged
from qwen_jax.errors import CheckpointError

COMPANIONS = {
    "tokenizer.json": b'{"a": 1}\n',
    "tokenizer_config.json": b"{}",
    "generation_config.json": b'{"temperature":0.7}',
    "sparse_attention_config.json": b"[1, 2]",
    "merges.txt": b"\xff\x00 bytes \r\n",
    "README.md": b"# model",
}


def load_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_tensors(a: Path, b: Path) -> None:
    one, other = load_all(a), load_all(b)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert tensor.shape == other[name].shape
        assert tensor.tobytes() == other[name].tobytes()


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_keeps_every_bit_and_every_file(hf_folder, edit, tmp_path, monkeypatch, dtype, tied):
    monkeypatch.setattr(sys.modules[convert.__module__], "_LEAST_GROUP_BYTES", 30_000)
    folder = hf_folder(torch_dtype=dtype, tie_word_embeddings=tied, eos_token_id=[1, 2])

    def awkward(t):
        t["model.norm.weight"][:] = 0  # a chunk of the fill value
        t["model.layers.0.input_layernorm.weight"][:] = -0.0
        tiny = {"bfloat16": 1e-40, "float16": 6e-8, "float32": 1e-45}[dtype]
        t["model.layers.1.input_layernorm.weight"][:] = tiny  # subnormal
        assert (t["model.layers.1.input_layernorm.weight"] != 0).all()

    edit(folder, awkward)
    for name, content in COMPANIONS.items():
        (folder / name).write_bytes(content)
    (folder / "pytorch_model.bin").write_bytes(b"the weights once more")
    convert(folder, tmp_path / "orbax")
    assert listing(tmp_path / "orbax") == sorted(["config.json", "params", *COMPANIONS])
    convert(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=20_000)
    assert_same_tensors(folder, tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    for name in ("config.json", *COMPANIONS):
        for copy in ("orbax", "back"):
            assert (tmp_path / copy / name).read_bytes() == (folder / name).read_bytes()
    assert listing(tmp_path) == ["back", "hf", "orbax"]
    convert(tmp_path / "back", tmp_path / "again")  # an exported folder is itself a checkpoint
    assert [p.name for p in (tmp_path / "again").glob("model*")] == []


def test_stored_head_of_a_tied_model_is_dropped(hf_folder, edit, tmp_path):
    folder = hf_folder(tie_word_embeddings=True)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    convert(folder, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    before = load_all(folder)
    del before["lm_head.weight"]
    assert load_all(tmp_path / "back").keys() == before.keys()


def test_progress_ends_at_the_total(hf_folder, tmp_path):
    folder = hf_folder()
    total = sum(t.nbytes for t in load_all(folder).values())
    for src, dst in (("hf", "orbax"), ("orbax", "back")):
        calls: list[tuple[int, int]] = []
        convert(tmp_path / src, tmp_path / dst, progress=lambda *call: calls.append(call))  # noqa: B023
        assert calls[-1] == (total, total)
        assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert folder.exists()


def test_destination_is_never_touched(hf_folder, tmp_path):
    folder = hf_folder()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "link", "hf"):
        with pytest.raises(CheckpointError, match=f"{name} exists already"):
            convert(folder, tmp_path / name)
    assert (tmp_path / "full" / "file").read_text() == "mine"
    with pytest.raises(CheckpointError, match="absent: no such folder to write out into"):
        convert(folder, tmp_path / "absent" / "out")
    assert listing(tmp_path) == ["full", "hf", "link"]


def test_somebody_elses_folder_in_the_way(hf_folder, tmp_path):
    folder = hf_folder()
    (tmp_path / "out.writing").mkdir()
    (tmp_path / "out.writing" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"out\.writing is in the way"):
        convert(folder, tmp_path / "out")
    assert (tmp_path / "out.writing" / "file").read_text() == "mine"


def test_two_conversions_to_one_destination(hf_folder, tmp_path):
    folder = hf_folder()
    with staged(tmp_path / "out") as out:
        with pytest.raises(CheckpointError, match="out is being written by another process"):
            convert(folder, tmp_path / "out")
        assert out.is_dir()
    assert listing(tmp_path / "out") == []


def test_nan_stops_the_conversion_and_leaves_nothing(hf_folder, edit, tmp_path):
    folder = hf_folder()

    def spoil(t):
        t["model.layers.2.mlp.up_proj.weight"][1, 1] = np.nan

    edit(folder, spoil)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        convert(folder, tmp_path / "out")
    assert listing(tmp_path) == ["hf"]


def test_full_disk_while_writing_safetensors(hf_folder, tmp_path, monkeypatch):
    convert(hf_folder(), tmp_path / "orbax")

    def full(self, name, array):
        if name == "model.norm.weight":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, array)

    write = SafetensorsWriter.write
    monkeypatch.setattr(SafetensorsWriter, "write", full)
    with pytest.raises(CheckpointError, match="out: the disk is full; nothing was kept") as caught:
        convert(tmp_path / "orbax", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["hf", "orbax"]


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of 100 kB, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("direction", ["to_orbax", "to_hf"])
def test_disk_that_really_fills_up(hf_folder, tmp_path, tiny_disk, monkeypatch, capfd, direction):
    src = hf_folder(vocab_size=1024)
    if direction == "to_hf":
        convert(src, tmp_path / "orbax")
        src = tmp_path / "orbax"
    with pytest.raises(
        CheckpointError, match=r"out: the disk is too full: 0\.000\d+ GB are needed there and"
    ):
        convert(src, tiny_disk / "out")
    assert listing(tiny_disk) == []
    # Somebody else may fill it meanwhile.
    monkeypatch.setattr(sys.modules[convert.__module__], "_require_space", lambda source, dst: None)
    with pytest.raises(CheckpointError, match="out: the disk is full; nothing was kept") as caught:
        convert(src, tiny_disk / "out")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # the exception says it all
    assert listing(tiny_disk) == []


def test_killed_at_any_point(hf_folder, tmp_path):
    hf = hf_folder()
    convert(hf, tmp_path / "orbax")
    deaths = {
        "hf": [
            "progress:2",
            "before:finish",
            "before:companions",
            "before:rename",
            "fsize:4000",
        ],
        "orbax": ["progress:20", "before:rename", "fsize:4000"],
    }
    cases = [
        [str(tmp_path / src), str(tmp_path / f"from-{src}-{i}"), death]
        for src, some in deaths.items()
        for i, death in enumerate(some)
    ]
    program = Path(__file__).with_name("dying_conversion.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(cases)], capture_output=True, text=True, env=environment, check=True
    )  # fmt: skip
    endings = done.stdout.splitlines()
    assert len(endings) == len(cases)
    for (src, dst, death), ending in zip(cases, endings, strict=True):
        destination, left = Path(dst), Path(dst + ".writing")
        assert not destination.exists()
        if death.startswith("fsize"):
            assert ending.startswith(f"refused: {dst}: writing failed, nothing was kept: ")
            assert not left.exists()
        else:
            assert ending == "signal 9"
            assert left.is_dir()
            for folder in (left, left / "out"):
                if (
                    death == "before:rename"
                    and folder.name == "out"
                    and "params.partial_save" not in listing(folder)
                ):
                    continue  # whole already, only not at its place
                with pytest.raises(CheckpointError):
                    open_checkpoint(folder)
        convert(src, dst)  # the next run starts clean
        assert not left.exists()
        source, result = open_checkpoint(src), open_checkpoint(dst)
        for param, layer in tensors(source.config):
            assert result.read(param, layer).tobytes() == source.read(param, layer).tobytes()
