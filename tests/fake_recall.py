"""`sparsity.recall.measure` without a model: recall as a formula of the sizes, for tests of what is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qwen_jax.prefill import Piece
from qwen_jax.sparsity import refinement, search
from qwen_jax.sparsity.recall import Measured, Sizes


def measure(
    model: Any,
    token_ids: np.ndarray,
    sizes: Sizes,
    *,
    chunk: int,
    keys: float | None = None,
    **unused: Any,
) -> Iterator[tuple[Piece, Measured]]:
    """More lines recall more, later layers and heads need more of them, columns count twice, later pieces recall less."""
    vertical, slash = (np.asarray(x, np.float64) for x in sizes)
    if keys is not None:
        factor = keys / (vertical + slash)
        vertical, slash = np.round(vertical * factor), np.round(slash * factor)
    needed = 400 * (1 + np.add.outer(*map(np.arange, vertical.shape[1:])))
    for start in range(0, len(token_ids), chunk):
        length = min(chunk, len(token_ids) - start)
        recall = 1 - np.exp(-(2 * vertical + slash) / (needed * (1 + start / 1000)))
        found: Any = (vertical, slash, recall, vertical + slash)
        yield Piece(start, length, length, start), Measured(*found)


@pytest.fixture
def fake_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured in earnest."""
    for module in (refinement, search):
        monkeypatch.setattr(module, "measure", measure)
