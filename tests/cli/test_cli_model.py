"""The options that say which model is loaded and how: what `LLM` becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qwen_jax.cli import model, options
from qwen_jax.config import DualChunk
from qwen_jax.errors import QwenJaxError
from qwen_jax.llm import LLM

UNSET = dict.fromkeys(
    ["max_len", "prefill_chunk", "dtype", "kv_dtype", "weight_dtype", "matmul", "sparsity", "dca", "mesh"]
)


def load(path: Path, **given: Any) -> LLM:
    return model.load(str(path), **(UNSET | given))


def test_nothing_given_is_what_the_checkpoint_says(checkpoint: Path) -> None:
    llm = load(checkpoint)
    assert llm.max_len == 2048
    assert llm.config.dual_chunk == DualChunk(512, 128, 512)
    assert llm.model.embed.weight[...].dtype == jnp.float32


@pytest.mark.parametrize(
    ("text", "expected"),
    [("none", None), ("64,16", DualChunk(64, 16)), ("64, 16, 32", DualChunk(64, 16, 32))],
)
def test_dual_chunk_attention(checkpoint: Path, text: str, expected: DualChunk | None) -> None:
    assert load(checkpoint, dca=text).config.dual_chunk == expected


def test_dtypes_and_lengths(checkpoint: Path) -> None:
    llm = load(checkpoint, dtype="bfloat16", kv_dtype="float32", max_len=4096, prefill_chunk=64)
    assert llm.model.embed.weight[...].dtype == jnp.bfloat16
    assert llm.new_context().cache.k.dtype == jnp.float32
    assert llm.max_len == 4096


def test_mesh(checkpoint: Path) -> None:
    llm = load(checkpoint, mesh="data=1,tensor=2")
    assert llm.model.layers.attn.q.weight[...].sharding.num_devices == 2
    assert llm.new_context().cache.k.sharding.num_devices == 2


@pytest.mark.parametrize(
    "text", ["tensor", "tensor=0", "tensor=-1", "heads=2", "tensor=2,tensor=1", "", "tensor=2;data=1"]
)
def test_mesh_that_cannot_be_read(text: str) -> None:
    with pytest.raises(QwenJaxError, match=r"--mesh .*: give sizes of data, context, tensor"):
        options.mesh(text)


def test_mesh_of_more_devices_than_there_are() -> None:
    with pytest.raises(QwenJaxError, match=f"needs 4096 devices, there are {jax.device_count()}$"):
        options.mesh("tensor=4096")


@pytest.mark.parametrize("text", ["", "64", "64,16,8,4", "a,b", "64,-1", "6.4,1"])
def test_dual_chunk_attention_that_cannot_be_read(text: str) -> None:
    with pytest.raises(QwenJaxError, match=r"--dca .*: give chunk_size,local_size"):
        options.dual_chunk(text)


@pytest.mark.parametrize(
    ("text", "ids"),
    [("1,2,3", [1, 2, 3]), (" 1 2\n3 ", [1, 2, 3]), ("1, 2,3,", [1, 2, 3]), ("-1", [-1]), ("", [])],
)
def test_token_ids(text: str, ids: list[int]) -> None:
    assert options.token_ids(text) == ids


@pytest.mark.parametrize("text", ["a", "1.5", "1;2", "0x1", "1" * 30])
def test_token_ids_that_cannot_be_read(text: str) -> None:
    with pytest.raises(QwenJaxError, match=r"--token-ids: .* is not a token id"):
        options.token_ids(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("1000", 1000), ("7k", 7000), ("1B", 1)],
)
def test_number_of_bytes(text: str, count: int) -> None:
    assert options.number_of_bytes(text, "--max-shard-size") == count


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "0", "5 apples", "1IB", "0.1"])
def test_number_of_bytes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(QwenJaxError, match=r"--max-shard-size .*: give a size"):
        options.number_of_bytes(text, "--max-shard-size")
