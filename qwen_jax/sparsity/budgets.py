"""How many lines each head may keep: the published `sparse_attention_config.json` (`algorithms.md` 4.2).

The file is a list over layers of {head: [type, vertical, slash, score]}; heads are query heads, counted over the whole model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.config import ModelConfig
from qwen_jax.errors import QwenJaxError
from qwen_jax.json_fields import read_json
from qwen_jax.sparsity.progress_file import write_whole

FILE_NAME = "sparse_attention_config.json"
PATTERN = "vertical_and_slash"
LARGEST = 1 << 24  # lines; no context is as long, and the sums of two sizes stay far inside int32
# The released engine reads a vertical size of exactly 30, the sinks alone, as 130.
_SINKS_ALONE, _READ_AS = 30, 130


class BudgetError(QwenJaxError):
    """A budget file that is broken or belongs to another model."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """One head's entry as the file has it: columns and diagonals to keep, and the recall measured when it was chosen."""

    vertical: int
    slash: int
    score: float = 1.0


def as_read(budget: Budget) -> Budget:
    """The entry as the engine reads it: exactly 30 columns, the sinks alone, are 130 (`algorithms.md` 4.2)."""
    return dataclasses.replace(budget, vertical=_READ_AS) if budget.vertical == _SINKS_ALONE else budget


class LineBudgets:
    """The budgets of all heads as the engine uses them; never changed: what a piece cannot use is cut off where it is used.

    A pytree of two arrays, so that it enters a jitted function; `most_vertical` is static.

    Attributes:
        vertical_LN, slash_LN: int32[L, N], lines a head keeps, the 30 forced columns and 100 forced diagonals among them.
        most_vertical: no entry of vertical_LN is larger.
    """

    def __init__(self, vertical_LN: jax.Array, slash_LN: jax.Array, most_vertical: int):
        self.vertical_LN, self.slash_LN, self.most_vertical = vertical_LN, slash_LN, most_vertical

    @classmethod
    def of(cls, heads_LN: list[list[Budget]]) -> LineBudgets:
        """The arrays of entries as a file has them."""
        vertical = np.array([[as_read(b).vertical for b in layer] for layer in heads_LN], np.int32)
        slash = np.array([[b.slash for b in layer] for layer in heads_LN], np.int32)
        return cls(jnp.asarray(vertical), jnp.asarray(slash), int(vertical.max()))


jax.tree_util.register_dataclass(
    LineBudgets, data_fields=["vertical_LN", "slash_LN"], meta_fields=["most_vertical"]
)


def read(path: str | Path, config: ModelConfig) -> list[list[Budget]]:
    """The entries of a budget file, by layer and head, as written.

    Raises:
        QwenJaxError: no such file, broken JSON, another number of layers or heads than the model's, a pattern other
            than vertical_and_slash, or a size that is not a whole number from 0 to 2^24.
    """
    path = Path(path)
    raw = read_json(path)
    if not isinstance(raw, list) or not all(isinstance(layer, dict) for layer in raw):
        raise BudgetError(f"{path}: not a list of layers, each an object of heads")
    if len(raw) != config.num_layers:
        raise BudgetError(f"{path}: budgets of {len(raw)} layers, and the model has {config.num_layers}")
    heads = [str(n) for n in range(config.num_heads)]
    out = []
    for number, layer in enumerate(raw):
        if layer.keys() != set(heads):
            odd = sorted(layer.keys() ^ set(heads))[0]
            raise BudgetError(
                f"{path}: layer {number} must have heads 0 to {config.num_heads - 1}; "
                f"head {odd!r:.40} is {'not one of them' if odd in layer else 'missing'}"
            )
        out.append([_entry(layer[head], f"{path}: layer {number}, head {head}") for head in heads])
    return out


def write(path: str | Path, heads_LN: list[list[Budget]]) -> None:
    """Writes entries in the published format, all at once; `read` gives them back unchanged."""
    raw = [
        {str(n): [PATTERN, b.vertical, b.slash, b.score] for n, b in enumerate(layer)} for layer in heads_LN
    ]
    write_whole(Path(path), json.dumps(raw))


def _entry(raw: Any, where: str) -> Budget:
    if not isinstance(raw, list) or len(raw) != 4:
        raise BudgetError(f"{where}: expected [type, vertical, slash, score], got {raw!r:.80}")
    kind, vertical, slash, score = raw
    if kind != PATTERN:
        raise BudgetError(f"{where}: pattern {kind!r:.40} is not supported; only {PATTERN!r} is")
    for name, size in (("vertical", vertical), ("slash", slash)):
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= LARGEST:
            raise BudgetError(
                f"{where}: {name} size must be a whole number from 0 to {LARGEST}, got {size!r:.40}"
            )
    if not isinstance(score, (int, float)) or isinstance(score, bool) or not math.isfinite(score):
        raise BudgetError(f"{where}: score must be a number, got {score!r:.40}")
    return Budget(vertical, slash, float(score))
