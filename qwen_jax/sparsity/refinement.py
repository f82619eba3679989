"""Budgets that recall enough: measure, raise what falls short, measure again (`algorithms.md` 4.9)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from qwen_jax.model import Qwen2
from qwen_jax.prefill import Piece
from qwen_jax.sparsity.budgets import LARGEST, Budget, as_read
from qwen_jax.sparsity.progress_file import ProgressFile
from qwen_jax.sparsity.recall import Sizes, measure

STEP = 2048  # lines; the smallest raise of the table
# (recall at least, raise in steps): what turns the published first budgets into the published files.
_RAISES = ((0.9, 1.0), (0.8, 1.0), (0.7, 2.0), (0.6, 4.0), (-1.0, 12244 / 2048))
Report = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True)
class Round:
    """What the budgets of one round recalled on all sequences, by layer and head.

    Attributes:
        vertical_LN, slash_LN: int64, the budgets, as the engine reads them.
        recall_LN: mean over pieces of the mean over their queries.
        lowest_LN: the lowest mean of a piece.
        keys_LN: keys that a query computed, mean over pieces.
    """

    vertical_LN: np.ndarray
    slash_LN: np.ndarray
    recall_LN: np.ndarray
    lowest_LN: np.ndarray
    keys_LN: np.ndarray

    def budgets(self) -> list[list[Budget]]:
        """The entries for a budget file, the measured recall as their score."""
        arrays = (self.vertical_LN, self.slash_LN, self.recall_LN)
        return [
            [Budget(int(v), int(s), round(float(r), 6)) for v, s, r in zip(*rows, strict=True)]
            for rows in zip(*arrays, strict=True)
        ]


def raise_of(recall: np.ndarray, threshold: float, step: int = STEP) -> np.ndarray:
    """Columns, and as many diagonals, that a head of this recall gets on top: int64 like `recall`, 0 from `threshold` on."""
    steps = np.select([recall >= least for least, _ in _RAISES], [steps for _, steps in _RAISES])
    return np.where(recall >= threshold, 0, np.rint(steps * step)).astype(np.int64)


def refine(
    model: Qwen2,
    sequences: Sequence[np.ndarray],
    first: list[list[Budget]],
    progress: ProgressFile,
    *,
    threshold: float,
    cap: int,
    step: int = STEP,
    chunk: int,
    last_queries: int,
    on_piece: Callable[[int, int, Piece], None] | None = None,
    on_round: Callable[[int, Round], None] | None = None,
) -> Round:
    """Raises first budgets until every head recalls `threshold` of dense attention, or may not grow.

    Args:
        model: on one device.
        sequences: int32[T] each, as long as the prompts that the budgets are for.
        first: budgets to start from.
        progress: where each sequence's figures are saved; a run that was broken off goes on from there.
        threshold: in (0, 1].
        cap: most columns and most diagonals of a head; a first budget beyond it stays as it is.
        step: the table's smallest raise, in lines.
        chunk: tokens of a prefill piece.
        last_queries: queries at the end of a piece that choose its lines.
        on_piece: called with (round, sequence, piece) after each piece.
        on_round: called with each round's number and figures.

    Returns:
        The last round.
    """
    vertical_LN, slash_LN = (
        np.array([[getattr(as_read(b), name) for b in layer] for layer in first], np.int64)
        for name in ("vertical", "slash")
    )
    # The same in all rounds and for all sequences: one program.
    most_columns, longest = max(cap, int(vertical_LN.max())), max(map(len, sequences))
    rounds = progress.content.get("rounds", [])
    for number in range(1 << 20):
        if number == len(rounds):
            rounds.append([])
        for at in range(len(rounds[number]), len(sequences)):
            pieces = []
            sizes = Sizes(*(jnp.asarray(x[None], jnp.int32) for x in (vertical_LN, slash_LN)))
            for piece, found in measure(
                model, sequences[at], sizes, chunk=chunk, last_queries=last_queries,
                most_columns=most_columns, longest=longest,
            ):  # fmt: skip
                pieces.append([np.asarray(x[0], np.float64) for x in (found.recall, found.keys)])
                if on_piece:
                    on_piece(number, at, piece)
            recall, keys = (np.stack(x) for x in zip(*pieces, strict=True))
            sums = {"recall": recall.sum(0), "lowest": recall.min(0), "keys": keys.sum(0)}
            rounds[number].append({"pieces": len(pieces)} | {k: x.tolist() for k, x in sums.items()})
            progress.save({"rounds": rounds})
        done = rounds[number]
        pieces_in_all = sum(each["pieces"] for each in done)
        found_round = Round(
            vertical_LN,
            slash_LN,
            np.sum([each["recall"] for each in done], 0) / pieces_in_all,
            np.min([each["lowest"] for each in done], 0),
            np.sum([each["keys"] for each in done], 0) / pieces_in_all,
        )
        if on_round:
            on_round(number, found_round)
        more_LN = raise_of(found_round.recall_LN, threshold, step)
        raised = [np.maximum(x, np.minimum(x + more_LN, min(cap, LARGEST))) for x in (vertical_LN, slash_LN)]
        if all((a == b).all() for a, b in zip(raised, (vertical_LN, slash_LN), strict=True)):
            return found_round
        vertical_LN, slash_LN = raised
    raise AssertionError("budgets grow in every round, and are bounded")
