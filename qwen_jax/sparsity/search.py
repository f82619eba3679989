"""Each head's first budget: the entry of the published grid that recalls most at equal cost (`algorithms.md` 4.8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from qwen_jax.errors import QwenJaxError
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Piece
from qwen_jax.sparsity.budgets import Budget
from qwen_jax.sparsity.progress_file import ProgressFile
from qwen_jax.sparsity.recall import Sizes, measure

# (columns, diagonals) of the search space, as the engine runs them: the A-shape (100, 800) and the block-sparse pattern, whose
# winners become (100, 800) and (1000, 6096), and the vertical-slash shapes.
GRID = ((100, 800), (30, 800), (100, 750), (500, 700), (3500, 100), (1000, 6096))
KEYS = 5120  # a query; the published target, an A-shape of 1,024 first and 4,096 nearest keys


@dataclasses.dataclass(frozen=True)
class Found:
    """The winners.

    Attributes:
        choice_LN: int64, index into GRID.
        budgets: its sizes, scaled to the cost, with the recall as their score.
        recall_CLN: recall of every shape at that cost.
    """

    choice_LN: np.ndarray
    budgets: list[list[Budget]]
    recall_CLN: np.ndarray


def search(
    model: Qwen2,
    sequences: Sequence[np.ndarray],
    progress: ProgressFile,
    *,
    keys: float = KEYS,
    chunk: int,
    last_queries: int,
    on_piece: Callable[[int, Piece], None] | None = None,
) -> Found:
    """Compares the shapes of GRID on every head, each scaled in every piece until a query computes `keys` keys.

    Args:
        model: on one device.
        sequences: int32[T] each.
        progress: where each sequence's figures are saved; a run that was broken off goes on from there.
        keys: keys a query computes; pieces whose queries see fewer than twice as many are left out.
        chunk: tokens of a prefill piece.
        last_queries: queries at the end of a piece that choose its lines.
        on_piece: called with (sequence, piece) after each piece.

    Raises:
        QwenJaxError: no sequence is long enough.
    """
    if max(len(ids) for ids in sequences) <= 2 * keys:
        raise QwenJaxError(
            f"no calibration sequence is longer than {2 * keys:g} tokens, twice the {keys:g} keys a query is to compute: "
            "give longer texts, or fewer keys"
        )
    C, L, N = len(GRID), model.config.num_layers, model.config.num_heads
    grid = [np.broadcast_to(np.array(x, np.int32)[:, None, None], (C, L, N)) for x in zip(*GRID, strict=True)]
    done = progress.content.get("sequences", [])
    for at in range(len(done), len(sequences)):
        pieces = []
        sizes = Sizes(*(jnp.asarray(x) for x in grid))
        for piece, found in measure(
            model,
            sequences[at],
            sizes,
            chunk=chunk,
            last_queries=last_queries,
            keys=keys,
            longest=max(map(len, sequences)),
        ):
            if piece.start + piece.length / 2 > 2 * keys:
                pieces.append(
                    [np.asarray(x, np.float64) for x in (found.vertical, found.slash, found.recall)]
                )
            if on_piece:
                on_piece(at, piece)
        sums = [sum(x) for x in zip(*pieces, strict=True)] if pieces else np.zeros((3, C, L, N))
        names = ("vertical", "slash", "recall")
        done.append({"pieces": len(pieces)} | {k: x.tolist() for k, x in zip(names, sums, strict=True)})
        progress.save({"sequences": done})
    count = sum(each["pieces"] for each in done)
    if not count:
        raise QwenJaxError(
            f"no piece of {chunk} tokens has queries that see {2 * keys:g} keys: give longer texts, or fewer keys"
        )
    vertical, slash, recall = (
        np.sum([each[name] for each in done], 0) / count for name in ("vertical", "slash", "recall")
    )
    choice_LN = recall.argmax(0)
    best = [np.take_along_axis(x, choice_LN[None], 0)[0] for x in (vertical, slash, recall)]
    budgets = [
        [Budget(_columns(v), round(s), round(r, 6)) for v, s, r in zip(*rows, strict=True)]
        for rows in zip(*(x.tolist() for x in best), strict=True)
    ]
    return Found(choice_LN, budgets, recall)


def _columns(size: float) -> int:
    """Rounded, and never to the 30 that a file's reader takes for 130."""
    return 31 if round(size) == 30 else round(size)
