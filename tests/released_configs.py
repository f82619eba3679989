"""What config.json of the released Qwen2.5 models holds, and their exact parameter counts (`algorithms.md` 1.1)."""

from __future__ import annotations

import copy
from typing import Any

# name: hidden, layers, query heads, KV heads, MLP, vocabulary, tied, eps, positions, parameters
_SIZES: dict[str, tuple[Any, ...]] = {
    "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151_936, True, 1e-6, 32_768, 494_032_768),
    "Qwen2.5-1.5B-Instruct": (1536, 28, 12, 2, 8960, 151_936, True, 1e-6, 32_768, 1_543_714_304),
    "Qwen2.5-3B-Instruct": (2048, 36, 16, 2, 11_008, 151_936, True, 1e-6, 32_768, 3_085_938_688),
    "Qwen2.5-7B-Instruct": (3584, 28, 28, 4, 18_944, 152_064, False, 1e-6, 32_768, 7_615_616_512),
    "Qwen2.5-14B": (5120, 48, 40, 8, 13_824, 152_064, False, 1e-5, 131_072, 14_770_033_664),
    "Qwen2.5-32B-Instruct": (5120, 64, 40, 8, 27_648, 152_064, False, 1e-6, 32_768, 32_763_876_352),
    "Qwen2.5-72B": (8192, 80, 64, 8, 29_568, 152_064, False, 1e-5, 131_072, 72_706_203_648),
    "Qwen2.5-7B-Instruct-1M": (3584, 28, 28, 4, 18_944, 152_064, False, 1e-5, 1_010_000, 7_615_616_512),
    "Qwen2.5-14B-Instruct-1M": (5120, 48, 40, 8, 13_824, 152_064, False, 1e-5, 1_010_000, 14_770_033_664),
}
NAMES = tuple(_SIZES)
LONG = tuple(name for name in NAMES if name.endswith("-1M"))
NUM_PARAMS = {name: row[-1] for name, row in _SIZES.items()}
HEAD_DIM = {name: row[0] // row[2] for name, row in _SIZES.items()}


def old_form(name: str) -> dict[str, Any]:
    """config.json as released, written by transformers 4."""
    hidden, layers, heads, kv_heads, mlp, vocab, tied, eps, positions, _ = _SIZES[name]
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645 if "Instruct" in name else 151_643,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": positions,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": eps,
        "rope_theta": 10_000_000.0 if name in LONG else 1_000_000.0,
        "sliding_window": positions,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }
    if "Instruct" not in name:
        config["use_mrope"] = False
    if name in LONG:
        config["dual_chunk_attention_config"] = {
            "chunk_size": 262_144,
            "local_size": 8192,
            "original_max_position_embeddings": 262_144,
        }
    return config


def new_form(name: str) -> dict[str, Any]:
    """The same, as transformers 5 writes it back."""
    config = copy.deepcopy(old_form(name))
    config["dtype"] = config.pop("torch_dtype")
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    config["sliding_window"] = None
    config["pad_token_id"] = None
    config["transformers_version"] = "5.0.0"
    return config
