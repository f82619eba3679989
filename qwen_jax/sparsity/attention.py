"""Attention of one prefill piece, sparse for the rows whose prompt is long: scores, selection, attention, all on the device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qwen_jax.cache import KVCache, read_layer
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.blocks import Share
from qwen_jax.kernels.line_scores.api import line_scores
from qwen_jax.kernels.mixing import unmix
from qwen_jax.kernels.sparse_attention.api import attend_lines
from qwen_jax.kernels.sparse_attention.bands import BAND, bands_of
from qwen_jax.rope import Rotary
from qwen_jax.sparsity.budgets import LineBudgets
from qwen_jax.sparsity.cost_aware import Piece, computed_pairs, select_bands
from qwen_jax.sparsity.selection import select_lines

ALL_SPARSE = -1
# Where the rule of bands keeps the published choice: two bands beside the forced lines are too coarse to be spent better, and
# most of all keys are the same keys.
FEW_KEYS = 4 * BAND  # a query
MOST_PAIRS = 0.6  # of the causal ones


@dataclasses.dataclass(frozen=True)
class SparsePrefill:
    """Sparse prefill as one model uses it; a pytree, of which only `budgets` holds arrays.

    Attributes:
        budgets: lines of every layer and head.
        threshold: prompts longer than this many tokens are sparse, all others dense; with ALL_SPARSE there are no others.
        last_queries: queries at the end of a piece that choose its lines.
        bands: None: the published rule, columns and diagonals within the budget. A number: columns and bands by attention per
            key computed, for that share of the pairs that the published rule would compute (`cost_aware`).
    """

    budgets: LineBudgets
    threshold: int
    last_queries: int
    bands: float | None = None

    @property
    def most_columns(self) -> int:
        """No head of any layer chooses more columns."""
        most = self.budgets.most_vertical
        return most if self.bands is None else 2 * most

    def choose(
        self,
        columns_BNS: jax.Array,
        diagonals_BNS: jax.Array,
        *,
        layer: jax.Array | int,
        q_start: jax.Array | int,
        end_B: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Columns, bool[B, N, S], and bands, bool[B, N, M], for `attend_lines` from the `line_scores` of [q_start, end_B)."""
        budgets = self.budgets
        lines = select_lines(columns_BNS, diagonals_BNS, budgets.vertical_LN[layer], budgets.slash_LN[layer])
        bands_BNM = bands_of(lines.diagonals)
        if self.bands is None:
            return lines.columns, bands_BNM
        piece = Piece(jnp.int32(q_start), end_B)
        pairs_BN = computed_pairs(lines.columns, bands_BNM, piece)
        chosen = select_bands(
            columns_BNS, diagonals_BNS, self.bands * pairs_BN, piece,
            last_queries=self.last_queries, most_columns=self.most_columns,
        )  # fmt: skip
        if self.bands < 1:
            return chosen
        rows_B1 = (end_B - q_start)[:, None].astype(jnp.float32)
        causal_B1 = rows_B1 * (q_start + end_B + 1)[:, None] / 2
        kept_BN1 = ((pairs_BN < FEW_KEYS * rows_B1) | (pairs_BN > MOST_PAIRS * causal_B1))[..., None]
        return jnp.where(kept_BN1, lines.columns, chosen[0]), jnp.where(kept_BN1, bands_BNM, chosen[1])

    def for_prompts(self, prompt_len_B: np.ndarray) -> SparsePrefill | None:
        """What a program for prompts of these lengths, in tokens, needs: None if all are dense, no dense part if none is.

        Empty rows, which fill up a batch, are of either kind.
        """
        lengths_B = np.asarray(prompt_len_B)
        long_X = lengths_B[lengths_B > 0] > self.threshold
        if not long_X.any():
            return None
        return dataclasses.replace(self, threshold=ALL_SPARSE) if long_X.all() else self


jax.tree_util.register_dataclass(
    SparsePrefill, data_fields=["budgets"], meta_fields=["threshold", "last_queries", "bands"]
)


def attend_prompts(
    q_BTNH: jax.Array,
    cache: KVCache,
    sparse: SparsePrefill | None,
    *,
    layer: jax.Array,
    q_start: jax.Array,
    prompt_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    first: jax.Array | None = None,
    share: Share | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """(out [B, T, N, H], lse [B, T, N]) of `kernels.attention.api.attend`, over chosen lines in rows that are sparse; lines.

    Arguments as there; the cache holds the piece's own keys and values; prompt_len_B int32[B] is each row's whole prompt, in
    tokens; `backend` is that of dense attention.
    `first` is the first query that is real, by default q_start. With a share the lines are those that all keys would give.
    Lines are as `choose_lines` returns them, None if `sparse` is.
    """
    first = q_start if first is None else first
    k_LBKSH, v_LBKSH, at = read_layer(cache, layer, q_BTNH.dtype)
    common: dict[str, Any] = {
        "layer": at, "q_start": q_start, "scale_B": scale_B, "share": share,
        "rotary": cache.met_by(rotary),
    }  # fmt: skip
    dense = functools.partial(attend, q_BTNH, k_LBKSH, v_LBKSH, backend=backend, **common)

    def attend_rows() -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
        if sparse is None:
            return *dense(kv_len_B=prompt_len_B), None
        long_B = prompt_len_B > sparse.threshold
        # A row of no keys costs nothing: each half does the rows of the other kind for free.
        sparse_len_B, dense_len_B = jnp.where(long_B, prompt_len_B, 0), jnp.where(long_B, 0, prompt_len_B)
        lines = choose_lines(
            q_BTNH, k_LBKSH, sparse, budgets_layer=layer, prompt_len_B=sparse_len_B, first=first, **common
        )
        columns_BNS, bands_BNM = lines
        sparse_BTNH, sparse_BTN = attend_lines(
            q_BTNH, k_LBKSH, v_LBKSH,
            columns_BNS=columns_BNS, bands_BNM=bands_BNM, most_columns=sparse.most_columns, kv_len_B=sparse_len_B, **common,
        )  # fmt: skip
        if sparse.threshold == ALL_SPARSE:
            return sparse_BTNH, sparse_BTN, lines
        dense_BTNH, dense_BTN = dense(kv_len_B=dense_len_B)
        out = jnp.where(long_B[:, None, None, None], sparse_BTNH, dense_BTNH)
        return out, jnp.where(long_B[:, None, None], sparse_BTN, dense_BTN), lines

    out, lse, lines = attend_rows()
    return out if cache.v_scale is None else unmix(out), lse, lines


def choose_lines(
    q_BTNH: jax.Array,
    k_LBKSH: jax.Array,
    sparse: SparsePrefill,
    *,
    layer: jax.Array,
    budgets_layer: jax.Array,
    q_start: jax.Array,
    prompt_len_B: jax.Array,
    rotary: Rotary,
    scale_B: jax.Array,
    first: jax.Array,
    share: Share | None,
) -> tuple[jax.Array, jax.Array]:
    """Columns by slot, bool[B, N, S], and bands, bool[B, N, M], of a piece, for `attend_lines`; rows of length 0 have none.

    `layer` is that of the keys, `budgets_layer` that of the budgets; other arguments as `attend_prompts` takes them.
    """
    scores = line_scores(
        q_BTNH, k_LBKSH, kv_len_B=prompt_len_B, last_queries=sparse.last_queries, layer=layer, q_start=q_start,
        rotary=rotary, scale_B=scale_B, first=first, share=share,
    )  # fmt: skip
    end_B = jnp.minimum(q_start + q_BTNH.shape[1], prompt_len_B)
    choose = functools.partial(_choose_together, share=share) if share else SparsePrefill.choose
    return choose(sparse, *scores, layer=budgets_layer, q_start=first, end_B=end_B)


def _choose_together(
    sparse: SparsePrefill,
    columns_BNS: jax.Array,
    diagonals_BNS: jax.Array,
    *,
    layer: jax.Array,
    q_start: jax.Array,
    end_B: jax.Array,
    share: Share,
) -> tuple[jax.Array, jax.Array]:
    """`SparsePrefill.choose` over a context axis: each device chooses for some of the heads, from the scores of all keys.

    Scores travel once, and only to the device that chooses for their head. Columns come back by slot.
    """
    axis, blocks, N = share.axis, share.blocks, columns_BNS.shape[1]
    heads = -(-N // blocks.count)  # of one device; heads that are added have no lines

    def padded(x: jax.Array, fill: float) -> jax.Array:
        widths = ((0, 0), (0, heads * blocks.count - N), (0, 0))
        return jnp.pad(x, widths[: x.ndim], constant_values=fill)

    columns = lax.all_to_all(padded(columns_BNS, -jnp.inf), axis, split_axis=1, concat_axis=2, tiled=True)
    diagonals = lax.psum_scatter(padded(diagonals_BNS, -jnp.inf), axis, scatter_dimension=1, tiled=True)
    vertical, slash = (
        lax.dynamic_slice_in_dim(padded(x, 0), share.rank * heads, heads, 1)
        for x in (sparse.budgets.vertical_LN, sparse.budgets.slash_LN)
    )
    mine = dataclasses.replace(sparse, budgets=LineBudgets(vertical, slash, sparse.budgets.most_vertical))
    columns, bands = mine.choose(
        blocks.undeal(columns, 2), diagonals, layer=layer, q_start=q_start, end_B=end_B
    )
    columns = lax.all_to_all(blocks.deal(columns, 2), axis, split_axis=2, concat_axis=1, tiled=True)
    return columns[:, :N], lax.all_gather(bands, axis, axis=1, tiled=True)[:, :N]
