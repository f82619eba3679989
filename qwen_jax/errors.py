"""The one exception a user's mistake raises: the command line prints it as a single line and exits with 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class QwenJaxError(ValueError):
    """What was wrong, where, and what to do about it, in one line."""


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raises QwenJaxError naming the first id of an integer array that is outside the vocabulary."""
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise QwenJaxError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size} tokens")


class CheckpointError(QwenJaxError):
    """A checkpoint folder that cannot be read as what it claims to be."""


class ConfigError(CheckpointError):
    """A config.json that is broken, of another model, or asks for something this code does not do."""
