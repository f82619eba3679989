"""Folders that transformers wrote are read, and folders that we export are read by transformers. Needs torch."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qwen_jax.convert.converter import convert, open_checkpoint
from qwen_jax.convert.source import tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours


def bits(tensor) -> bytes:
    return (
        tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy().tobytes()
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_there_and_back(tmp_path: Path, dtype: str, tied: bool, shard: str) -> None:
    config = transformers.Qwen2Config(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, dtype=dtype,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    stored = model.state_dict()
    source = open_checkpoint(tmp_path / "theirs")
    assert source.dtype == np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    for param, layer in tensors(source.config):
        assert source.read(param, layer).tobytes() == bits(stored[param.hf_name(layer)])

    convert(tmp_path / "theirs", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "ours", max_shard_bytes=20_000)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert loaded.dtype == getattr(torch, dtype)
    for name, tensor in loaded.state_dict().items():
        assert bits(tensor) == bits(stored[name])
