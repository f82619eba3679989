"""A random checkpoint of a few kilobytes that has all a real one has: weights, tokenizer, chat template, generation config.

One token is one byte, so lengths are easy to count.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from qwen_jax.convert.synthetic import TINY, write_random_checkpoint

END, START, STOP = 256, 257, 258
SPECIAL = {END: "<|endoftext|>", START: "<|im_start|>", STOP: "<|im_end|>"}
CONFIG = TINY | {
    "vocab_size": 264,
    "num_hidden_layers": 2,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
    "dual_chunk_attention_config": {
        "chunk_size": 512,
        "local_size": 128,
        "original_max_position_embeddings": 512,
    },
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(folder: Path, *, tokenizer: bool = True, chat_template: bool = True, **config: Any) -> Path:
    """Writes the new folder and returns it."""
    write_random_checkpoint(folder, CONFIG | config)
    generation = {"do_sample": False, "eos_token_id": END}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        settings = {"eos_token": SPECIAL[END]} | ({"chat_template": CHAT_TEMPLATE} if chat_template else {})
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_loud(folder: Path) -> Path:
    """Makes attention matter: matrices 8 times the usual size, norms of ones."""
    tensors = load_file(folder / "model.safetensors")
    loud = {name: np.ones_like(x) if "norm" in name else 8 * x for name, x in tensors.items()}
    save_file(loud, folder / "model.safetensors")
    return folder


def byte_tokenizer() -> Tokenizer:
    """Byte b is token b, whatever stands beside it; the special tokens follow."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    letters = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    backend = Tokenizer(models.BPE(vocab={letter: b for b, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL.values()])
    return backend
