"""The shipped checkpoint's folder: where it is, and how training writes it, in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.flax
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qwen_jax.config import DualChunk, ModelConfig
from qwen_jax.evals.passkey import END_OF_TEXT, PAD, SPECIAL_TOKENS
from qwen_jax.params import params

DEFAULT = Path(__file__).resolve().parent.parent / "demo_checkpoint"
DUAL_CHUNK = DualChunk(chunk_size=2048, local_size=256, original_max_position_embeddings=2048)
MAX_POSITIONS = 262_144  # what the context may grow to; training stays within 2,048


def write(folder: Path, config: ModelConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Writes model, config, tokenizer and generation config.

    Args:
        folder: created if it does not exist; files of the same names are replaced.
        config: the model as trained; the folder's config.json adds dual chunk attention.
        weights: by `Param.path`, stacked rows with their leading layer axis; stored in bf16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_tensors(config, weights))
    content = safetensors.flax.save(tensors, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(content)
    tokenizer = byte_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", config_json(config))
    _write_json(
        folder / "generation_config.json",
        {"do_sample": False, "eos_token_id": END_OF_TEXT, "pad_token_id": PAD},
    )
    _write_json(folder / "tokenizer_config.json", tokenizer_config())


def config_json(config: ModelConfig) -> dict[str, Any]:
    """config.json of a trained model: Qwen2's keys, and dual chunk attention from the training length on."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": False,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": PAD,
        "dual_chunk_attention_config": {
            "chunk_size": DUAL_CHUNK.chunk_size,
            "local_size": DUAL_CHUNK.local_size,
            "original_max_position_embeddings": DUAL_CHUNK.original_max_position_embeddings,
        },
    }


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: byte b is token b, the special tokens follow."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json; no chat template, for the checkpoint holds no conversation."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[END_OF_TEXT - 256],
        "pad_token": SPECIAL_TOKENS[PAD - 256],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }


def _tensors(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> Any:
    for param in params(config):
        value = weights[param.path].astype(ml_dtypes.bfloat16)
        for layer in range(config.num_layers) if param.stacked else [None]:
            tensor = value if layer is None else value[layer]
            yield param.hf_name(layer), tensor.reshape(param.hf_shape(config))


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, by byte: itself if printable, else the next free one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    free = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
