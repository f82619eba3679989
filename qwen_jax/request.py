"""What a caller asks for, checked: prompts become token ids, or one clear line says why not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_jax.errors import QwenJaxError, check_ids
from qwen_jax.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray


class RequestError(QwenJaxError):
    """A prompt or a setting that cannot be served."""


def split_prompts(prompts: Any) -> tuple[bool, list[Any]]:
    """Whether it is one prompt, and the prompts. A string or a flat list of ids is one; an empty list is an empty one.

    Raises:
        RequestError: neither a text nor a sequence.
    """
    if isinstance(prompts, str):
        return True, [prompts]
    if not isinstance(prompts, (Sequence, np.ndarray)) or isinstance(prompts, (bytes, bytearray)):
        raise RequestError(f"a prompt is text or a list of token ids, got {type(prompts).__name__}")
    single = len(prompts) == 0 or isinstance(prompts[0], (int, np.integer))
    return single, [prompts] if single else list(prompts)


def ids_of(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> np.ndarray:
    """int32[T] of one prompt.

    Raises:
        QwenJaxError: empty, text without a tokenizer, not a flat list of ids, an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("the checkpoint has no tokenizer: give token ids instead of text")
        ids = np.asarray(tokenizer.encode(prompt), np.int64)
    else:
        try:
            ids = np.asarray(prompt)
        except ValueError:  # lists of different lengths
            raise RequestError(f"a prompt is text or a flat list of token ids, got {prompt!r:.80}") from None
    if ids.size == 0:
        raise RequestError("the prompt is empty")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(f"a prompt is text or a list of token ids, got {ids.dtype} of shape {ids.shape}")
    check_ids(ids, vocab_size)
    return ids.astype(np.int32)


def pad(rows: Sequence[np.ndarray], *, fill: int = 0, width: int | None = None) -> np.ndarray:
    """int32[B, width], right-padded; by default as wide as the longest row."""
    width = max(map(len, rows)) if width is None else width
    padded = [np.pad(row, (0, width - len(row)), constant_values=fill) for row in rows]
    return np.stack(padded).astype(np.int32)
