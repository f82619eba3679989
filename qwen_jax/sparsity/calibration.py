"""The texts that budgets are measured on: JSON lines of {"text": ...} or {"token_ids": [...]}."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from qwen_jax.errors import QwenJaxError
from qwen_jax.request import ids_of
from qwen_jax.tokenizer import Tokenizer


class CalibrationError(QwenJaxError):
    """A calibration file that cannot be used."""


def read_sequences(
    path: str | Path, tokenizer: Tokenizer | None, vocab_size: int, longest: int | None = None
) -> list[np.ndarray]:
    """The sequences of a calibration file, int32[T] each; empty lines are skipped.

    Args:
        path: the file, UTF-8.
        tokenizer: for texts; None if the checkpoint has none.
        vocab_size: token ids must lie below it.
        longest: most tokens of a sequence; None: any length.

    Raises:
        QwenJaxError: no such file, no sequence in it, or a line that is not such an object, is empty, or holds too many
            tokens or ids outside the vocabulary; the message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise CalibrationError(f"{path}: no such file") from None
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text: byte {error.start}") from None
    sequences = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                sequences.append(_sequence(line, tokenizer, vocab_size, longest))
            except QwenJaxError as error:
                raise CalibrationError(f"{path}, line {number}: {error}") from None
    if not sequences:
        raise CalibrationError(
            f'{path}: no sequence in it: give {{"text": ...}} or {{"token_ids": [...]}} a line'
        )
    return sequences


def _sequence(line: str, tokenizer: Tokenizer | None, vocab_size: int, longest: int | None) -> np.ndarray:
    try:
        raw = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CalibrationError(f"broken JSON: {error}") from None
    if not isinstance(raw, dict) or raw.keys() not in ({"text"}, {"token_ids"}):
        raise CalibrationError('expected {"text": ...} or {"token_ids": [...]} and nothing else')
    prompt = raw.get("text", raw.get("token_ids"))
    if not isinstance(prompt, str if "text" in raw else list):
        raise CalibrationError(f"{next(iter(raw))} is neither text nor a list: {prompt!r:.40}")
    ids = ids_of(prompt, tokenizer, vocab_size)
    if longest is not None and len(ids) > longest:
        raise CalibrationError(f"{len(ids)} tokens are more than the model's {longest}")
    return ids
