import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from qwen_jax.convert.safetensors_io import SafetensorsWriter, byte_runs, read_box, read_header
from qwen_jax.convert.source import box_of
from qwen_jax.errors import CheckpointError


def write_raw(file: Path, header: str | dict, data: bytes = b"") -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(begin: int, end: int, shape: list[int], dtype: str = "F16") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWICE = '{"a": ENTRY, "a": ENTRY}'.replace("ENTRY", json.dumps(entry(0, 4, [2])))


@st.composite
def shape_and_slices(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=4))
    index = []
    for size in shape:
        start = draw(st.integers(0, size))
        index.append(slice(start, draw(st.integers(start, size))))
    return tuple(shape), tuple(index)


@given(shape_and_slices())
def test_byte_runs_are_the_bytes_of_the_slice(case):
    shape, index = case
    array = np.arange(np.prod(shape, dtype=int), dtype=np.uint32).reshape(shape)
    raw, runs = array.tobytes(), list(byte_runs(shape, 4, box_of(index, shape)))
    assert b"".join(raw[offset : offset + length] for offset, length in runs) == array[index].tobytes()
    assert all(length > 0 for _, length in runs)


def test_whole_tensors_and_leading_slices_are_one_run():
    assert list(byte_runs((4, 3, 2), 2, ((0, 4), (0, 3), (0, 2)))) == [(0, 48)]
    assert list(byte_runs((4, 3, 2), 2, ((1, 3), (0, 3), (0, 2)))) == [(12, 24)]
    assert list(byte_runs((4, 3, 2), 2, ((0, 4), (1, 2), (0, 2)))) == [(4, 4), (16, 4), (28, 4), (40, 4)]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_reads_what_the_library_wrote(tmp_path, dtype):
    tensors = {"a": np.arange(24).reshape(6, 4).astype(dtype), "b": np.array([1, -0.0, 3], dtype)}
    save_file(tensors, tmp_path / "f.safetensors", metadata={"format": "pt"})
    infos = read_header(tmp_path / "f.safetensors")
    assert infos.keys() == tensors.keys()
    a = read_box(infos["a"], (2, 3, 4), ((1, 2), (1, 3), (1, 4)))  # the same bytes under other axes
    np.testing.assert_array_equal(a, tensors["a"].reshape(2, 3, 4)[1:2, 1:3, 1:4])
    assert read_box(infos["b"], (3,), ((0, 3),)).tobytes() == tensors["b"].tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_library_reads_what_the_writer_wrote(tmp_path, dtype):
    tensors = {"z": np.arange(10).reshape(2, 5).astype(dtype), "a": np.ones((3,), dtype)}
    shapes = {name: t.shape for name, t in tensors.items()}
    with SafetensorsWriter(tmp_path / "f.safetensors", shapes, np.dtype(dtype)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with safe_open(tmp_path / "f.safetensors", "numpy") as stream:
        assert stream.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert stream.get_tensor(name).tobytes() == tensor.tobytes()
            assert stream.get_tensor(name).shape == tensor.shape


def test_writer_refuses_another_order_and_an_early_end(tmp_path):
    shapes = {"a": (2,), "b": (2,)}
    one = np.ones(2, np.float32)
    with (
        pytest.raises(ValueError, match="expected"),
        SafetensorsWriter(tmp_path / "f", shapes, one.dtype) as writer,
    ):
        writer.write("b", one)
    with (
        pytest.raises(ValueError, match="before its last"),
        SafetensorsWriter(tmp_path / "g", shapes, one.dtype) as writer,
    ):
        writer.write("a", one)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ("not json", b"", "its header is not JSON"),
        ("[1]", b"", "not a JSON object"),
        ({"a": entry(0, 4, [2])}, b"123", r"truncated: \d+ bytes where its header promises \d+"),
        ({"a": entry(0, 4, [2])}, b"12345", "1 bytes after its last tensor"),
        ({"a": entry(2, 6, [2])}, b"123456", "a leaves a gap before it"),
        ({"a": entry(0, 4, [2]), "b": entry(2, 6, [2])}, b"123456", "b overlaps another tensor"),
        ({"a": entry(0, 6, [2])}, b"123456", r"a is F16 \[2\] but 6 bytes are set aside"),
        ({"a": {"dtype": "F16"}}, b"", "entry for a is malformed"),
        ({"a": entry(0, 4, [-2])}, b"1234", "entry for a is malformed"),
        ({"a": entry(0, 4, [2.0])}, b"1234", "entry for a is malformed"),
        (TWICE, b"1234", "names a twice"),
    ],
)  # fmt: skip
def test_damaged_headers(tmp_path, header, data, message):
    file = write_raw(tmp_path / "f.safetensors", header, data)
    with pytest.raises(CheckpointError, match=rf"f\.safetensors.*{message}"):
        read_header(file)


def test_files_that_are_not_safetensors(tmp_path):
    (tmp_path / "short").write_bytes(b"\x80\x02")
    (tmp_path / "pickle").write_bytes(b"\x80\x02}q\x00(X\x01\x00" * 4)
    for name in ("short", "pickle"):
        with pytest.raises(CheckpointError, match=f"{name} is truncated"):
            read_header(tmp_path / name)
    with pytest.raises(CheckpointError, match="absent cannot be read: No such file"):
        read_header(tmp_path / "absent")


def test_file_cut_after_its_header_was_read(tmp_path):
    file = write_raw(tmp_path / "f.safetensors", {"a": entry(0, 4, [2])}, b"1234")
    info = read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="truncated inside tensor a"):
        read_box(info, (2,), ((0, 2),))
