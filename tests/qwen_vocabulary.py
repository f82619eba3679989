"""The real Qwen2.5 tokenizer for tests: ranks from the package dashscope, transformers' converter."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, normalizers

# Added tokens of Qwen2.5 in the order of their ids, from 151643 on; the second part is not special.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
NOT_SPECIAL = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
ADDED = SPECIAL + NOT_SPECIAL
FIRST_ADDED = 151_643

# What tokenizers get wrong: scripts, joiners, line ends, blanks, control characters, marks.
TEXTS = {
    "english": "Hello, world! It's 3 o'clock; they've gone -- haven't they?",
    "chinese": "敏捷的棕色狐狸跳过了懒狗。繁體字也可以,標點「引號」!",
    "japanese": "いろはにほへと ちりぬるを カタカナ・漢字",
    "korean": "키스의 고유조건은 입술끼리 만나야 한다",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣",
    "hebrew": "דג סקרן שט בים",
    "hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "emoji with joiners": "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 ☺️",
    "rare planes": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓂀 🜁 \U0010fffd",
    "code": "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # 1_000\n",
    "line ends": "a\r\nb\rc\n\n\n d \t\r\n  \n",
    "blanks": "   leading, trailing   \t \u00a0\u2003\u3000 ",
    "controls": "nul \x00 bell \x07 escape \x1b[0m delete \x7f bom \ufeff",
    "composed marks": "Z͑ͫ̓a̴l̵g̶o̷ ệ ṩ",
    "a real replacement character": "\ufffd is U+FFFD \ufffd\ufffd",
    "empty": "",
}

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@functools.cache
def ranks_file() -> str:
    """Path of qwen.tiktoken, found without importing dashscope."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "the dev dependency group installs dashscope"
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "resources" / "qwen.tiktoken")


@functools.cache
def converter() -> Any:
    """transformers' tiktoken converter on these ranks, with Qwen2's word pattern as transformers has it."""
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    converter = TikTokenConverter(vocab_file=ranks_file(), pattern=PRETOKENIZE_REGEX)
    # Finding the merges takes seconds and both kinds of folder need them.
    converter.extract_vocab_merges_from_model = functools.cache(converter.extract_vocab_merges_from_model)
    return converter


@functools.cache
def backend() -> tokenizers.Tokenizer:
    """The whole tokenizer: ranks, NFC, added tokens."""
    backend = converter().converted()
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in NOT_SPECIAL])
    return backend


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json as Qwen2.5 ships it."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {
        "added_tokens_decoder": {
            str(FIRST_ADDED + n): {"content": token, "special": token in SPECIAL} | flags
            for n, token in enumerate(ADDED)
        },
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "tokenizer_class": "Qwen2Tokenizer",
    }


def write_tokenizer_json(folder: Path) -> Path:
    """A folder as newer checkpoints have it."""
    backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return folder


def write_vocab_and_merges(folder: Path) -> Path:
    """A folder as older checkpoints have it: the same ranks as vocab.json and merges.txt."""
    vocab, merges = converter().extract_vocab_merges_from_model(ranks_file())
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return folder
