"""How much attention given budgets keep: recall = exp(lse_sparse - lse_full) a head, along a chunked prefill.

The prefill is dense: its hidden states flow on, and sparse attention is only computed beside it, for its log-sum-exp. No
attention matrix is needed (`algorithms.md` 4.9).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qwen_jax.cache import KVCache, init_cache, write_chunk
from qwen_jax.kernels.attention.api import attend
from qwen_jax.kernels.line_scores.api import FORCED_COLUMNS, FORCED_DIAGONALS, line_scores
from qwen_jax.kernels.sparse_attention.api import attend_lines
from qwen_jax.kernels.sparse_attention.bands import bands_of
from qwen_jax.model import Qwen2
from qwen_jax.prefill import Piece, Prefiller, piece_tokens
from qwen_jax.sharding import mesh_of
from qwen_jax.sparsity.cost_aware import Piece as Queries
from qwen_jax.sparsity.cost_aware import computed_pairs
from qwen_jax.sparsity.selection import select_lines

_FIT_STEPS = 12  # halvings of a factor between 2^-8 and 2^12: to 0.3%


class Sizes(NamedTuple):
    """Budgets to try: int32[C, L, N] columns and diagonals of C candidates for every layer and head."""

    vertical: jax.Array
    slash: jax.Array


class Measured(NamedTuple):
    """What one piece showed, all [C, L, N]: sizes as used, recall in (0, 1] averaged over queries, keys a query computed."""

    vertical: jax.Array
    slash: jax.Array
    recall: jax.Array
    keys: jax.Array


def measure(
    model: Qwen2,
    token_ids: np.ndarray,
    sizes: Sizes,
    *,
    chunk: int,
    last_queries: int,
    keys: float | None = None,
    most_columns: int | None = None,
    longest: int = 0,
) -> Iterator[tuple[Piece, Measured]]:
    """Prefills one sequence densely and yields what every piece of it showed.

    Args:
        model: on one device.
        token_ids: int32[T].
        sizes: the candidates.
        chunk: tokens of a prefill piece.
        last_queries: queries at the end of a piece that choose its lines.
        keys: None: sizes are used as they are. A number: in every piece each candidate's sizes are first scaled, head by head,
            to cost at most this many keys a query.
        most_columns: no size is larger; None: any size.
        longest: tokens of the longest sequence to come. It and most_columns compile programs of their own.
    """
    graph, params = nnx.split(model)
    prefiller = Prefiller(graph, params, model.config, chunk)
    T = len(token_ids)
    capacity = -(-max(T, longest) // 256) * 256
    # On the weights' mesh, as every piece returns it: elsewhere the first piece would compile a program of its own.
    weight = model.embed.weight[...]
    cache = init_cache(model.config, 1, capacity, weight.dtype, mesh_of(weight))
    most = capacity if most_columns is None else min(most_columns, capacity)
    for piece in prefiller.pieces(0, T, capacity):
        found, cache = _measure_piece(
            graph, params, jnp.asarray(piece_tokens(token_ids[None], 0, piece)), jnp.int32(piece.start),
            jnp.array([T], jnp.int32), cache, sizes, jnp.float32(keys or 0),
            last_queries=last_queries, most_columns=most, fit=keys is not None,
        )  # fmt: skip
        yield piece, found


@functools.partial(
    jax.jit, static_argnames=("graph", "last_queries", "most_columns", "fit"), donate_argnames="cache"
)
def _measure_piece(
    graph: nnx.GraphDef,
    params: nnx.State,
    tokens_1T: jax.Array,
    start: jax.Array,
    length_1: jax.Array,
    cache: KVCache,
    sizes: Sizes,
    keys: jax.Array,
    *,
    last_queries: int,
    most_columns: int,
    fit: bool,
) -> tuple[Measured, KVCache]:
    model: Qwen2 = nnx.merge(graph, params)
    T = tokens_1T.shape[1]
    scale_1 = model.score_scale(length_1, length_1)
    common: dict[str, Any] = {
        "q_start": start,
        "rotary": cache.met_by(model.rotary),
        "scale_B": scale_1,
        "kv_len_B": length_1,
    }
    queries = Queries(start, jnp.minimum(start + T, length_1))
    rows = (queries.end_B[0] - start).astype(jnp.float32)
    real_T = start + jnp.arange(T) < length_1[0]

    def candidate(
        q_1TNH: jax.Array, cache: KVCache, layer: jax.Array, lse_TN: jax.Array, scores: tuple[jax.Array, jax.Array],
        sizes_N: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, ...]:  # fmt: skip
        vertical_N, slash_N = _fitted(scores, *sizes_N, queries, keys) if fit else sizes_N
        lines = select_lines(*scores, vertical_N, slash_N)
        bands_1NM = bands_of(lines.diagonals)
        _, sparse_1TN = attend_lines(
            q_1TNH, cache.k, cache.v,
            columns_BNS=lines.columns, bands_BNM=bands_1NM, most_columns=most_columns, layer=layer, **common,
        )  # fmt: skip
        kept_TN = jnp.where(real_T[:, None], jnp.minimum(jnp.exp(sparse_1TN[0] - lse_TN), 1.0), 0.0)
        pairs_N = computed_pairs(lines.columns, bands_1NM, queries)[0]
        return vertical_N, slash_N, kept_TN.sum(0) / rows, pairs_N / rows

    def attend_and_measure(
        q: jax.Array, k: jax.Array, v: jax.Array, carry: tuple[KVCache, Measured], layer: jax.Array
    ) -> tuple[jax.Array, tuple[KVCache, Measured]]:
        cache, found = carry
        cache = write_chunk(cache, k, v, layer=layer, start=start)
        out, lse_1TN = attend(
            q, cache.k, cache.v, layer=layer, backend=model.attention_backend, **common
        )  # fmt: skip
        scores = line_scores(q, cache.k, layer=layer, last_queries=last_queries, **common)
        here = lax.map(
            lambda sizes_N: candidate(q, cache, layer, lse_1TN[0], scores, sizes_N),
            (sizes.vertical[:, layer], sizes.slash[:, layer]),
        )
        return out, (cache, Measured(*(x.at[:, layer].set(y) for x, y in zip(found, here, strict=True))))

    zeros = jnp.zeros(sizes.vertical.shape)
    found = Measured(jnp.zeros_like(sizes.vertical), jnp.zeros_like(sizes.slash), zeros, zeros)
    positions_1T = (start + jnp.arange(T, dtype=jnp.int32))[None]
    _, (cache, found) = model.run_layers(
        model.embed(tokens_1T), positions_1T, (cache, found), attend_and_measure
    )
    return found, cache


def _fitted(
    scores: tuple[jax.Array, jax.Array], vertical_N: jax.Array, slash_N: jax.Array, queries: Queries, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Sizes times the largest factor a head at which they cost at most `keys` keys a query, the forced lines at least."""
    S = scores[0].shape[-1]

    def scaled(power_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tuple(
            jnp.clip(jnp.round(x * 2.0**power_N), least, S).astype(jnp.int32)
            for x, least in ((vertical_N, FORCED_COLUMNS), (slash_N, FORCED_DIAGONALS))
        )  # type: ignore[return-value]

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_N, high_N = bounds
        middle_N = (low_N + high_N) / 2
        lines = select_lines(*scores, *scaled(middle_N))
        pairs_N = computed_pairs(lines.columns, bands_of(lines.diagonals), queries)[0]
        fits_N = pairs_N <= keys * (queries.end_B[0] - queries.start)
        return jnp.where(fits_N, middle_N, low_N), jnp.where(fits_N, high_N, middle_N)

    ends = jnp.full(vertical_N.shape, -8.0), jnp.full(vertical_N.shape, 12.0)
    return scaled(lax.fori_loop(0, _FIT_STEPS, halve, ends)[0])
