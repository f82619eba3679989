"""A small random checkpoint as every test here starts from it, and ways to damage it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwen_jax.convert.synthetic import TINY, write_random_checkpoint

Tensors = dict[str, np.ndarray]


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes random Hugging Face folders: hf_folder(sharded=True, torch_dtype="float16", ...)."""

    def make(name: str = "hf", *, sharded: bool = False, seed: int = 0, **overrides: Any) -> Path:
        limit = 20_000 if sharded else 10**9
        write_random_checkpoint(tmp_path / name, TINY | overrides, seed=seed, max_shard_bytes=limit)
        return tmp_path / name

    return make


@pytest.fixture
def edit() -> Callable[[Path, Callable[[Tensors], Any]], None]:
    """Rewrites a one-file checkpoint, with the safetensors library, after a change to its tensors."""

    def apply(folder: Path, change: Callable[[Tensors], Any]) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return apply
